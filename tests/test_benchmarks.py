"""The benchmarks say what was measured: their statistics, their FLOPs, and one small run of each script."""

from __future__ import annotations

import importlib
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

SCRIPTS = Path(__file__).resolve().parents[1] / "benchmarks"
if not SCRIPTS.is_dir():
    pytest.skip("needs the benchmarks of the checkout, which a source distribution leaves out", allow_module_level=True)


@pytest.fixture(scope="module", autouse=True)
def _scripts():
    """The scripts import each other by name, as from the folder they are started in; so do the processes they start."""
    sys.path.insert(0, str(SCRIPTS))
    yield
    sys.path.remove(str(SCRIPTS))


def script(name: str) -> ModuleType:
    return importlib.import_module(name)


# ------------------------------------------------------------------------------------------------ statistics


def test_quartiles_are_those_of_numpy():
    values = [7.0, 1.0, 4.0, 2.0, 11.0, 3.5]
    expected = torch.quantile(torch.tensor(values, dtype=torch.float64), torch.tensor([0.25, 0.5, 0.75]).double())
    assert script("rounds").quartiles(values) == pytest.approx(expected.tolist())


def test_quartiles_of_one_value_are_that_value():
    assert script("rounds").quartiles([3.0]) == (3.0, 3.0, 3.0)


def test_quartiles_of_nothing_are_refused():
    with pytest.raises(ValueError, match="values is empty"):
        script("rounds").quartiles([])


def test_ratios_are_taken_within_rounds():
    """A drift of the machine that slows both by ten leaves each ratio as it was."""
    ratio = script("rounds").paired_ratio([2.0, 20.0, 4.0], [1.0, 10.0, 2.0])
    assert (ratio.median, ratio.low, ratio.high, ratio.n) == (2.0, 2.0, 2.0, 3)


def test_ratios_of_unequal_lengths_are_refused():
    with pytest.raises(ValueError, match="reference has 2 rounds and other 1"):
        script("rounds").paired_ratio([1.0, 2.0], [1.0])


@pytest.mark.parametrize(
    ("ratios", "verdict"),
    [
        ([1.1] * 10, "faster"),
        ([0.9] * 10, "slower"),
        ([1.0] * 10, "tie"),
        ([1.1] * 9 + [0.9], "faster"),
        ([1.1] * 8 + [0.9] * 2, "tie"),  # the quartiles exclude 1, the signs are 8 of 10: p = 0.11
        ([1.1] * 12 + [0.9] * 8, "tie"),
        ([1.1] * 5, "too few"),
        ([1.1] * 6, "faster"),
    ],
)
def test_faster_is_said_only_beyond_doubt(ratios: list[float], verdict: str):
    rounds = script("rounds")
    assert rounds.paired_ratio(ratios, [1.0] * len(ratios)).verdict == verdict


def test_sign_test_is_the_binomial_tail():
    sign_test = script("rounds").sign_test
    assert sign_test(10, 0) == 2 / 2**10
    assert sign_test(1, 9) == 2 * (1 + 10) / 2**10
    assert sign_test(5, 5) == 1.0
    assert sign_test(0, 0) == 1.0


def test_a_round_with_one_slow_probe_is_discarded():
    """Each variant is held against its own best: the second column has twice the threads."""
    probes = [[100.0, 200.0], [85.0, 190.0], [79.0, 200.0], [100.0, 150.0]]
    assert script("rounds").quiet_rounds(probes) == [True, True, False, False]
    assert script("rounds").quiet_rounds(probes, 0.0) == [True] * 4
    assert script("rounds").quiet_rounds([]) == []


def test_only_kept_rounds_are_compared():
    rounds = script("rounds")

    def one(a: float, b: float, probe: float):
        return {n: rounds.Reading(v, v, probe, 0.0, 0.0, {"x": v}) for n, v in (("a", a), ("b", b))}

    run = rounds.Run({"a": {}, "b": {}}, [one(1.0, 2.0, 100.0), one(1.0, 50.0, 10.0), one(2.0, 6.0, 90.0)])
    assert run.values("b") == [2.0, 6.0]
    assert run.values("a", "x") == [1.0, 2.0]
    assert rounds.compare(run, "a")["b"].median == 2.5
    record = rounds.readings_record(run)
    assert (record["rounds"], record["discarded"], len(record["readings"])) == (3, 1, 3)


def test_table_is_markdown():
    assert script("rounds").table([["", "ms"], ["ours", "1.5"]]) == "|      | ms  |\n|------|-----|\n| ours | 1.5 |"


# ------------------------------------------------------------------------------------------------ FLOPs


def reference_flops(sizes) -> int:
    """Count the matrix products of transformers' model, forward and backward, with attention as products."""
    from transformers import ViTMAEForPreTraining

    model = ViTMAEForPreTraining(script("methods").vit_mae_config(sizes, attn_implementation="eager"))
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, sizes.image, sizes.image)).loss.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("mask_ratio", [0.75, 0.5])
def test_the_formula_counts_every_product_of_the_plain_model(mask_ratio: float):
    methods = script("methods")
    sizes = replace(methods.CONFIGS["micro"], mask_ratio=mask_ratio)
    assert methods.step_flops(sizes) == reference_flops(sizes)


def test_flops_of_vit_b_are_those_of_the_literature():
    """17.5 G multiply-adds for ViT-B/16 at 224 px (Liu et al. 2021, "Swin Transformer", Table 1, DeiT-B)."""
    methods = script("methods")
    base = methods.CONFIGS["vit-b"]
    encoder = methods.embedding_flops(base) + base.depth * methods.block_flops(1 + base.patches, base.width)
    assert encoder / 2e9 == pytest.approx(17.5, abs=0.1)


def test_mask_tokens_in_the_encoder_cost_what_the_paper_says():
    """Table 1c: 3.3 times the FLOPs for ViT-L with the default decoder."""
    large = replace(script("methods").CONFIGS["vit-b"], width=1024, depth=24, heads=16)
    flops = script("methods").step_flops
    assert flops(replace(large, mask_tokens_in_encoder=True)) / flops(large) == pytest.approx(3.3, abs=0.1)


# ------------------------------------------------------------------------------------------------ the harness


def fail():
    raise ValueError("as asked")


def test_saved_memory_counts_storages_once_and_no_weights():
    """A linear layer keeps its input (4 x 8 floats) for the weight's gradient, sigmoid its output (4 x 2)."""
    model = torch.nn.Linear(8, 2)
    x = torch.zeros(4, 8)
    _, kept = script("step").count_saved(lambda: model(x).sigmoid().sum(), model)
    assert kept == 4 * (4 * 8 + 4 * 2)


def test_an_error_in_another_process_is_not_swallowed(capfd: pytest.CaptureFixture[str]):
    with pytest.raises(RuntimeError, match="fail failed; its error is printed above"):
        script("rounds").call_apart(fail)
    assert "as asked" in capfd.readouterr().err


@pytest.mark.multiprocess
def test_step_measures_equal_models_side_by_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    step = script("step")
    monkeypatch.setattr(step, "call_apart", lambda function, **arguments: function(**arguments))  # saves an import
    out = tmp_path / "step.jsonl"
    arguments = ["--config", "micro", "--rounds", "2", "--quiet", "0", "--out", str(out)]
    step.main([*arguments, "--variants", "ours", "transformers-best"])
    printed = capsys.readouterr().out
    record = json.loads(out.read_text())
    assert record["equal"]["transformers-best"]["gradient"] < 1e-5
    assert [set(one) for one in record["readings"]] == [{"ours", "transformers-best", "gemm"}] * 2
    assert record["ratios"]["wall"]["transformers-best"]["verdict"] == "too few"
    mine = record["variants"]["ours"]
    gflop = script("methods").step_flops(script("methods").CONFIGS["micro"]) * 4 / 1e9
    assert mine["gflops"] == pytest.approx(gflop / mine["seconds"])
    assert 0 < mine["of_peak"] < 1
    assert mine["saved_mb"] < record["variants"]["transformers-best"]["saved_mb"]
    assert "ours equals transformers-best" in printed
    assert "fastest of the others: transformers-best" in printed


def test_on_a_gpu_its_own_seconds_are_compared():
    """No GPU here: the figures of one are made up, the report is not."""
    rounds, step = script("rounds"), script("step")

    def reading(**extra: float):
        return rounds.Reading(9.0, 9.0, 1.0, 0.0, 0.0, extra)

    readings = {"ours": reading(device=0.5), "official": reading(device=1.0), "gemm": reading(gflops=1000.0)}
    facts = {"saved_mb": 1.0, "built_mb": 0.0}
    run = rounds.Run({"ours": facts, "official": facts, "gemm": {}}, [readings] * 10)
    sizes = script("methods").CONFIGS["micro"]
    summary = step.summarize(run, sizes, 4, "device")
    ratios = {m: rounds.compare(run, "ours", m, ["ours", "official"]) for m in ("device", "cpu")}
    assert summary["variants"]["ours"]["images_per_second"] == 8.0
    text = step.report(summary, ratios, "ours")
    assert "x2.000 [2.000, 2.000] n=10 faster" in text
    assert "x1.000 [1.000, 1.000] n=10 tie" in text


def test_step_names_unknown_variants():
    with pytest.raises(SystemExit, match="theirs: unknown; choose from official"):
        script("step").main(["--variants", "theirs"])


def test_step_says_what_a_missing_peer_needs():
    said: list[str] = []
    names = script("step").choose_variants(["official", "ours"], None, said.append)
    assert names == ["ours"]
    assert len(said) == 1
    assert said[0].startswith("without official: needs --official CHECKOUT of github.com/facebookresearch/mae")


def test_costs_are_per_image_of_all_ranks():
    rounds, scaling = script("rounds"), script("scaling")
    reading = rounds.Reading(6.0, 6.0, 1.0, 0.0, 0.0, {})
    points = {"one": scaling.Point(scaling.B, 3), "two": scaling.Point(scaling.B, 3, ranks=2)}
    run = rounds.Run({"one": {}, "two": {}}, [{"one": reading, "two": reading}])
    assert scaling.per_image(run, points, "wall") == {"one": [2.0], "two": [1.0]}


def test_every_section_starts_with_what_the_others_are_compared_with():
    scaling = script("scaling")
    for name, section in scaling.SECTIONS.items():
        points = section()
        assert len(points) >= 2, name
        assert all(math.isfinite(script("methods").step_flops(point.sizes)) for point in points.values())
    assert set(scaling.PAPER_TABLE2) < set(scaling.table2())
