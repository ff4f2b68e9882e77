"""Sweeps on the bundled digits: their tables and plots, on one process and on two, and what they refuse at once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hf_mae import sweep
from hf_mae.cli.sweeps import sweep_command
from hf_mae.recipes.base import Data
from hf_mae.recipes.classification import ClassifierEvals, check_classifier
from hf_mae.recipes.mae import QUICKSTART
from hf_mae.recipes.supervised import BIRD_AUGMENTS, SUPERVISE
from hf_mae.recipes.transfer import FINETUNE, PROBE, probe_of
from hf_mae.sweep import band, metric_of, read_result, sweep_over, sweep_partial, sweep_seeds, sweep_variants, table


@pytest.fixture
def recipe(tmp_path, encoder):
    return replace(
        FINETUNE["finetune-digits"],
        out=str(tmp_path / "run"),
        init_from=str(encoder),
        max_steps=4,
        global_batch=64,
        eval_every=0,
        num_workers=0,
        evals=ClassifierEvals(split="test", pictures=False),
    )


def test_sweep_partial_writes_table_and_plot_and_is_cheap_to_repeat(recipe, tmp_path):
    one = replace(recipe, out=str(tmp_path / "sweep"), max_steps=4, eval_every=0)
    summary = sweep_partial(one, blocks=(0, 0.5, 2, 6), seeds=2)
    assert list(summary["values"]) == ["0", "0.5", "2"]  # the encoder has two blocks
    assert [len(v["runs"]) for v in summary["values"].values()] == [2, 2, 2]
    assert (tmp_path / "sweep" / "partial.png").stat().st_size > 5000
    written = (tmp_path / "sweep" / "table.md").read_text()
    assert written.count("\n") == 5
    assert "| 0 (linear probe: probe-digits) | 2 |" in written
    saved = {
        k: json.loads((Path(v["runs"][0]["out"]) / "recipe.json").read_text()) for k, v in summary["values"].items()
    }
    assert [one["model"]["head"] for one in saved.values()] == ["batchnorm", "linear", "linear"]
    assert [one["trainable_blocks"] for one in saved.values()] == [0, 0.5, 2]
    assert saved["0"]["optim"] == json.loads(json.dumps(asdict(PROBE["probe-digits"].optim)))
    assert (saved["0"]["max_steps"], saved["0"]["global_batch"], saved["0"]["epochs"]) == (4, 64, 90)
    assert json.loads((tmp_path / "sweep" / "sweep.json").read_text()) == summary
    assert sweep_partial(one, blocks=(0, 0.5, 2, 6), seeds=2) == summary


@pytest.mark.parametrize(("size", "preset"), [("b", "finetune-vit-b"), ("l", "finetune-vit-l-table9")])
def test_no_block_of_a_paper_preset_is_the_papers_probe(recipe, monkeypatch, size, preset):
    """LARS, batch normalisation and no mixing: what Fig. 9 has at 0, whatever the fine-tuning is."""
    data = replace(recipe.data, repeat_augment=3)
    one = replace(FINETUNE[preset], out=recipe.out, init_from=recipe.init_from, data=data, evals=recipe.evals)
    begun = recorded(monkeypatch, lambda one: [0.5])
    drawn = []
    monkeypatch.setattr(sweep, "draw_partial", lambda *_, zero, **__: drawn.append(zero))
    sweep_partial(one, blocks=(1, 0))
    block, zero = begun
    assert (block.optim.name, block.model.head, block.trainable_blocks) == ("adamw", "linear", 1)
    probe = PROBE[f"probe-vit-{size}"]
    assert (zero.name, zero.optim, zero.schedule, zero.epochs) == (probe.name, probe.optim, probe.schedule, 90)
    assert (zero.optim.name, zero.global_batch, zero.trainable_blocks) == ("lars", 16384, 0)
    assert (zero.model.head, zero.model.pool, zero.model.head_init_std, zero.model.drop_path_rate) == (
        *("batchnorm", "cls", 0.01, 0.0),
    )
    assert (zero.augment.crop, zero.augment.rand_augment, zero.augment.mixup, zero.augment.erase_prob) == (
        *("clamped", None, 0.0, 0.0),
    )
    assert (zero.data.path, zero.data.repeat_augment, zero.init_from) == ("digits", 1, recipe.init_from)
    assert set(drawn) == {"linear probe"}


def test_every_fine_tuning_has_a_probe_that_keeps_what_was_typed():
    for name, one in FINETUNE.items():
        probe = probe_of(replace(one, init_from="org/encoder"))
        check_classifier(probe)
        assert (probe.model.head, probe.trainable_blocks, probe.data.path) == ("batchnorm", 0, one.data.path), name
        assert probe.optim.name == ("lars" if "vit-" in name and "birds" not in name else "sgd"), name
        assert (probe.epochs, probe.evals.best) == (90, "top1")
    typed = replace(FINETUNE["finetune-vit-b"], init_from="org/encoder", global_batch=64, max_steps=7, epochs=3, seed=5)
    probe = probe_of(replace(typed, augment=replace(typed.augment, mean=(0.5,) * 3)))
    assert (probe.global_batch, probe.max_steps, probe.epochs, probe.seed) == (64, 7, 90, 5)
    assert probe.augment.mean == (0.5, 0.5, 0.5)


def test_sweep_seeds_gives_mean_deviation_and_histogram(recipe, tmp_path):
    summary = sweep_seeds(replace(recipe, out=str(tmp_path / "seeds"), max_steps=4), n=3)
    found = [run["last"] for run in summary["values"]["all"]["runs"]]
    assert summary["values"]["all"]["mean"] == pytest.approx(np.mean(found))
    assert summary["values"]["all"]["sd"] == pytest.approx(np.std(found, ddof=1))
    assert [read_result(tmp_path / "seeds" / f"seed_{s}", "top1")["last"] for s in range(3)] == found
    assert (tmp_path / "seeds" / "seeds.png").stat().st_size > 5000
    assert not (tmp_path / "seeds" / "band.png").exists()  # one evaluation makes no curve


def recorded(monkeypatch, numbers):
    """Runs that write the accuracies `numbers(recipe)` of their evaluations, one an epoch, and train nothing."""
    begun = []

    def train(one):
        folder = Path(one.out)
        folder.mkdir(parents=True)
        rows = [{"step": 10 * i, "epoch": float(i), "loss": 1.0} for i in range(1, 4)]
        rows += [{"step": 10 * i, "epoch": float(i), metric_of(one): v} for i, v in enumerate(numbers(one), 1)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        begun.append(one)
        return folder

    monkeypatch.setattr(sweep, "classify", train)
    monkeypatch.setattr(sweep, "trainer_of", lambda _: train)
    return begun


def test_the_band_is_of_the_evaluations_that_all_runs_made():
    def run(*values):
        return {"curve": [{"step": 10 * i, "epoch": i / 2, "value": v} for i, v in enumerate(values)]}

    first, second = band([run(0.1, 0.5, 0.9), run(0.3, 0.5)])
    assert first == {"step": 0, "epoch": 0.0, "mean": 0.2, "sd": pytest.approx(0.02**0.5), "min": 0.1, "max": 0.3}
    assert (second["mean"], second["sd"]) == (0.5, 0)
    assert band([run(0.1)])[0]["sd"] is None


def test_seeds_draw_accuracy_by_epoch(recipe, monkeypatch):
    recorded(monkeypatch, lambda one: [0.1, 0.2, 0.3 + one.seed / 100])
    summary = sweep_seeds(recipe, n=3)
    assert summary["values"]["all"]["runs"][2]["curve"][-1] == {"step": 30, "epoch": 3.0, "value": 0.32}
    assert (Path(recipe.out) / "band.png").stat().st_size > 5000


def test_a_sweep_over_a_field_has_a_run_for_each_value_and_seed(recipe, monkeypatch):
    begun = recorded(monkeypatch, lambda one: [one.augment.label_smoothing + one.seed / 10])
    summary = sweep_over(recipe, "augment.label_smoothing", [0.0, 0.06], seeds=2)
    assert [(one.augment.label_smoothing, one.seed) for one in begun] == [(0, 0), (0.06, 0), (0, 1), (0.06, 1)]
    assert {k: v["mean"] for k, v in summary["values"].items()} == {"0": 0.05, "0.06": pytest.approx(0.11)}
    assert Path(begun[1].out) == Path(recipe.out) / "0.06" / "seed_0"
    assert (Path(recipe.out) / "over.png").stat().st_size > 5000
    assert "| augment.label_smoothing | runs |" in (Path(recipe.out) / "table.md").read_text()


def test_a_real_sweep_over_a_field_trains_and_is_cheap_to_repeat(recipe):
    one = replace(recipe, max_steps=2)
    summary = sweep_over(one, "optim.name", ["adamw", "sgd"])
    assert [v["runs"][0]["steps"] for v in summary["values"].values()] == [2, 2]
    assert sweep_over(one, "optim.name", ["adamw", "sgd"]) == summary


def test_a_sweep_over_a_field_finds_mistakes_before_the_first_run(recipe, never):
    with pytest.raises(ValueError, match=r"'augment.label_smooting' is unknown .* augment.label_smoothing"):
        sweep_over(recipe, "augment.label_smooting", [0.1])
    with pytest.raises(ValueError, match=r"augment.label_smoothing=1.0 must lie in \[0, 1\)"):
        sweep_over(recipe, "augment.label_smoothing", [0.1, 1.0])
    with pytest.raises(ValueError, match=r"augment.label_smoothing=0.1, 0.1 names a value twice"):
        sweep_over(recipe, "augment.label_smoothing", [0.1, 0.1])
    with pytest.raises(ValueError, match="no value is named"):
        sweep_over(recipe, "augment.label_smoothing", [])
    with pytest.raises(ValueError, match="seeds=0 makes no run"):
        sweep_over(recipe, "augment.label_smoothing", [0.1], seeds=0)


def test_variants_of_several_kinds_are_compared_by_the_number_that_decides_in_each(recipe, monkeypatch, tmp_path):
    birds = replace(SUPERVISE["supervise-digits"], evals=recipe.evals)
    averaged = replace(
        birds, optim=replace(birds.optim, ema_decay=0.9), evals=replace(birds.evals, best="ema_top1"), seed=5
    )
    begun = recorded(monkeypatch, lambda one: [0.5, 0.6 if one.seed < 5 else 0.8])
    variants = {"ViT": recipe, "as published": birds, "averaged": averaged}
    summary = sweep_variants(variants, seeds=2, out=tmp_path / "sweep", title="Birds")
    assert {k: v["mean"] for k, v in summary["values"].items()} == pytest.approx(
        {"ViT": 0.6, "as published": 0.6, "averaged": 0.8}
    )
    assert [one.seed for one in begun] == [0, 0, 5, 1, 1, 6]
    assert Path(begun[1].out) == tmp_path / "sweep" / "as-published" / "seed_0"
    for name in ("variants.png", "band.png"):
        assert (tmp_path / "sweep" / name).stat().st_size > 5000


def test_variants_that_do_not_compare_are_refused(recipe, never, tmp_path):
    with pytest.raises(ValueError, match="measured by knn_accuracy and top1, which do not compare"):
        sweep_variants({"a": recipe, "b": QUICKSTART}, out=tmp_path)
    with pytest.raises(ValueError, match="two names make one folder"):
        sweep_variants({"a b": recipe, "a/b": recipe}, out=tmp_path)
    with pytest.raises(ValueError, match="recipes is empty"):
        sweep_variants({}, out=tmp_path)


def test_one_run_has_no_deviation():
    values = {"1": {"mean": 0.5, "sd": None, "min": 0.5, "max": 0.5, "runs": [{}]}}
    assert "not measured" in table(values, "trainable blocks", "top1")


@pytest.fixture
def unlabelled(tmp_path):
    """Two splits of images in no class."""
    for split in ("train", "test"):
        (tmp_path / "unlabelled" / split).mkdir(parents=True)
        for i in range(4):
            Image.fromarray(np.full((8, 8), i, np.uint8)).save(tmp_path / "unlabelled" / split / f"{i}.png")
    return tmp_path / "unlabelled"


@pytest.fixture
def never(monkeypatch):
    """A run that begins is too late for a mistake."""

    def begin(recipe):
        pytest.fail(f"{recipe.out} was begun")

    monkeypatch.setattr(sweep, "classify", begin)
    monkeypatch.setattr(sweep, "pretrain", begin)
    monkeypatch.setattr("hf_mae.supervise.supervise", begin)


def test_an_architecture_that_timm_does_not_have_is_found_before_the_first_run(never):
    birds = SUPERVISE["supervise-digits"]
    with pytest.raises(ValueError, match=r"model.architecture=resnet99 is unknown to timm"):
        sweep_over(birds, "model.architecture", ["test_resnet", "resnet99"])


def test_every_data_set_of_the_variants_is_opened_before_the_first_run(unlabelled, never, tmp_path):
    birds = SUPERVISE["supervise-digits"]

    def with_data(path, split="test"):
        return replace(birds, data=Data(path=str(path)), evals=replace(birds.evals, split=split))

    with pytest.raises(ValueError, match=r"run second: .*has no labels"):
        sweep_variants({"first": birds, "second": with_data(unlabelled)}, out=tmp_path)
    with pytest.raises(ValueError, match=r"run second: .*missing"):
        sweep_variants({"first": birds, "second": with_data(tmp_path / "missing")}, out=tmp_path)
    with pytest.raises(ValueError, match=r"run second: evals.split='testt'"):
        sweep_variants({"first": birds, "second": with_data("digits", "testt")}, out=tmp_path)
    trained_on = replace(with_data("digits", None), data=Data(path="digits", split="test"))
    with pytest.raises(ValueError, match=r"run second: digits: no validation or test split was found"):
        sweep_variants({"first": birds, "second": trained_on}, out=tmp_path)


def augmented(monkeypatch, *flags):
    """The recipes that `hf-mae sweep augment` compares."""
    asked = {}
    monkeypatch.setattr(sweep, "sweep_variants", lambda recipes, **_: asked.update(recipes))
    sweep_command(["augment", "--data.path", "digits", *flags])
    return asked


def test_pipelines_keep_what_none_of_them_defines(monkeypatch):
    flags = ["--augment.mixup", "0.2", "--augment.cutmix", "1.0", "--augment.color-jitter", "0.4"]
    flags += ["--augment.mix-mode", "pair", "--augment.label-smoothing", "0.1", "--augment.crop", "center"]
    for name, recipe in augmented(monkeypatch, *flags).items():
        augment = recipe.augment
        assert (augment.mixup, augment.cutmix, augment.mix_mode, augment.color_jitter) == (0.2, 1.0, "pair", 0.4)
        assert (augment.label_smoothing, augment.crop) == (0.1, "center")
        for field in ("rotate", "rotate_once", "flip", "erase_prob", "rotate_fill", "auto_augment", "rand_augment"):
            assert getattr(augment, field) == getattr(BIRD_AUGMENTS[name], field)


@pytest.mark.parametrize(
    "flag", [["--augment.rotate", "10"], ["--augment.no-flip"], ["--augment.rand-augment", "rand-m6"]]
)
def test_a_flag_that_every_pipeline_overrides_is_refused(monkeypatch, flag):
    name = flag[0].replace("no-", "")
    with pytest.raises(ValueError, match=f"{name}: set by the pipelines that are compared"):
        augmented(monkeypatch, *flag)


def test_partial_finds_mistakes_before_the_first_run(recipe, unlabelled, never):
    with pytest.raises(ValueError, match=r"trainable_blocks=1.5 must be 0, 0.5"):
        sweep_partial(recipe, blocks=(0, 1.5))
    with pytest.raises(ValueError, match=r"trainable_blocks=7.5 must be 0, 0.5"):
        sweep_partial(recipe, blocks=(0, 7.5))
    with pytest.raises(ValueError, match="all beyond the 2 blocks of the encoder"):
        sweep_partial(recipe, blocks=(3, 6))
    with pytest.raises(ValueError, match="seeds=0 makes no run"):
        sweep_partial(recipe, seeds=0)
    untested = replace(recipe, data=Data(path=str(unlabelled / "train")), evals=ClassifierEvals())
    with pytest.raises(ValueError, match="no validation or test split was found, and a sweep compares top1"):
        sweep_partial(untested, blocks=(0,))


@pytest.mark.parametrize(
    ("field", "values", "said"),
    [
        ("model.target", ["pixel", "pca"], "target=pca is not available yet"),
        ("model.patch_size", [2, 3], "image_size=8 is not a multiple of patch_size=3"),
        ("model.mask_strategy", ["random", "cross"], "mask_strategy='cross' is unknown"),
    ],
)
def test_a_model_that_cannot_be_made_is_found_before_the_first_run(field, values, said, never):
    with pytest.raises(ValueError, match=said):
        sweep_over(QUICKSTART, field, values)


def test_seeds_of_pretraining_need_a_number_to_compare(unlabelled, never):
    with pytest.raises(ValueError, match=r"evals.knn=False measures no knn_accuracy"):
        sweep_seeds(replace(QUICKSTART, evals=replace(QUICKSTART.evals, knn=False)))
    with pytest.raises(ValueError, match="has no labels, and a sweep compares knn_accuracy"):
        sweep_seeds(replace(QUICKSTART, data=Data(path=str(unlabelled))))


@pytest.mark.parametrize(("depth", "width", "drawn"), [(24, 1024, True), (24, 768, False), (2, 16, False)])
def test_the_numbers_of_the_paper_are_drawn_for_its_encoder_alone(recipe, monkeypatch, tmp_path, depth, width, drawn):
    monkeypatch.setattr(sweep, "_encoder_size", lambda _: (depth, width))
    monkeypatch.setattr(sweep, "classify", lambda one: Path(one.out))
    monkeypatch.setattr(sweep, "read_result", lambda folder, metric: {"last": 0.5})
    references = []
    monkeypatch.setattr(sweep, "draw_partial", lambda *_, reference, **__: references.append(reference))
    (tmp_path / "run").mkdir()
    sweep_partial(recipe, blocks=(0, 1))
    assert [reference is not None for reference in references] == [drawn, drawn]
    if drawn:
        ((name, points),) = references[0].items()
        assert "Fig. 9" in name
        assert points[1] == pytest.approx((0.5, 0.791))


@pytest.mark.multiprocess
def test_two_processes_sweep_together(encoder, tmp_path):
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(Path(__file__).parents[1] / "scripts" / "sweep.py"), "seeds", "finetune", "finetune-digits"]
    command += ["--num-seeds", "2", "--init-from", str(encoder), "--out", str(tmp_path / "seeds"), "--max-steps", "2"]
    command += ["--global-batch", "64", "--num-workers", "1", "--eval-every", "0", "--evals.no-pictures"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("sweep: run 2 of 2") == 1
    summary = json.loads((tmp_path / "seeds" / "sweep.json").read_text())
    assert [run["seed"] for run in summary["values"]["all"]["runs"]] == [0, 1]
    assert (tmp_path / "seeds" / "seeds.png").stat().st_size > 5000
    assert not list((tmp_path / "seeds").glob(".*.tmp"))
