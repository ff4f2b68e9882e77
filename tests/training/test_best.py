"""The best model is kept whole, a run ends early when told to, and a resumed one decides as one that never stopped."""

from __future__ import annotations

import json
import math
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hf_mae.models.modeling_classification import MAEForImageClassification
from hf_mae.training.best import Best
from hf_mae.training.checkpoint import TrainState, damage, load_checkpoint
from hf_mae.training.monitors import TIMES


class Script:
    """An evaluator that says what it is told, at every second update."""

    def __init__(self, *values, name="top1"):
        self.values, self.name = values, name

    def due(self, step, total):
        return step % 2 == 0

    def __call__(self, task, step):
        index = step // 2
        return {self.name: self.values[index] if index < len(self.values) else self.values[-1], "other": float(step)}

    def finish(self, task, step):
        pass


def best_of(run):
    return json.loads((run.out / "best" / "best.json").read_text())


def test_the_model_with_the_best_number_is_kept(fine_tuning):
    run = replace(fine_tuning, evaluators=(Script(0.1, 0.2, 0.9, 0.5, 0.9),)).change(save_every=1)
    run.recipe = replace(run.recipe, engine=replace(run.recipe.engine, keep_checkpoints=100))
    assert run.train() == "finished"
    assert best_of(run) == {"metric": "top1", "value": 0.9, "step": 4, "numbers": {"top1": 0.9, "other": 4.0}}
    assert (run.state.best_value, run.state.best_step) == (0.9, 4)
    kept = load_file(run.out / "best" / "model" / "model.safetensors")
    then = load_file(run.out / "checkpoints" / "step_00000004" / "model" / "model.safetensors")
    assert all(torch.equal(v, then[k]) for k, v in kept.items())
    assert damage(run.out / "best") is None
    MAEForImageClassification.from_pretrained(run.out / "best" / "model")
    assert [p.name for p in run.out.glob(".*")] == []


def test_of_a_loss_less_is_better(fine_tuning):
    run = replace(fine_tuning, evaluators=(Script(3.0, 1.0, 2.0, name="eval_loss"),), best="eval_loss")
    run.train()
    assert best_of(run)["step"] == 2


def test_averaged_weights_are_kept_where_their_number_decides(fine_tuning):
    run = replace(fine_tuning, evaluators=(Script(*range(11), name="ema_top1"),), best="ema_top1")
    run.train()
    kept, averaged = load_file(run.out / "best" / "model" / "model.safetensors"), run.average.state()
    assert best_of(run)["step"] == 20
    assert all(torch.equal(kept[k], v) for k, v in averaged.items())
    assert not torch.equal(kept["head.weight"], run.weights()["model.head.weight"])


def test_averaged_numbers_without_averaged_weights_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"evals.best=ema_top1 needs averaged weights; add --optim.ema-decay"):
        make_best(tmp_path, metric="ema_top1")


def make_best(folder, metric="top1", patience=None):
    accelerator = type("Alone", (), {"num_processes": 1, "is_main_process": True})()
    return Best(
        folder / "best",
        metric=metric,
        accelerator=accelerator,
        task=torch.nn.Linear(1, 1),
        average=None,
        patience=patience,
    )


def test_numbers_that_are_not_finite_are_never_the_best(tmp_path):
    state = TrainState(step=3)
    judge = make_best(tmp_path, patience=2)
    assert not judge({"top1": math.nan}, state)
    assert judge({"top1": math.inf}, state)
    assert state.best_value is None
    assert not (tmp_path / "best").exists()


def test_an_evaluation_without_the_number_does_not_count(tmp_path):
    state = TrainState(step=3, best_value=0.5)
    judge = make_best(tmp_path, patience=1)
    assert not judge({"knn_top1": 0.1}, state)
    assert state.evaluations_since_best == 0


def test_patience_ends_the_run_with_a_checkpoint(fine_tuning):
    """Best at update 4, then three that are not better: 6, 8, 10. Neither a log nor a save step."""
    run = replace(fine_tuning, evaluators=(Script(0.1, 0.2, 0.9, 0.5, 0.9),), patience=3)
    assert run.train() == "early"
    assert run.state.step == 10
    assert run.checkpoints()[-1].name == "step_00000010"
    again = replace(run)
    assert again.train(resume=run.checkpoints()[-1]) == "early"
    assert again.state.step == 10


def test_a_run_that_ends_early_logs_its_open_window_and_tells_the_evaluators(fine_tuning):
    """Ten updates, none of them a log step."""
    ended = []

    class Told(Script):
        def finish(self, task, step):
            ended.append((step, run.checkpoints()[-1].name))

    run = replace(fine_tuning, evaluators=(Told(0.1, 0.2, 0.9, 0.5, 0.9),), patience=3).change(log_every=0)
    assert run.train() == "early"
    assert ended == [(10, "step_00000010")]
    logged = [row for row in rows_of(run) if "loss" in row]
    assert [row["step"] for row in logged] == [10]
    assert run.monitor.verdict().startswith(("learning: loss", "not learning: loss"))
    every = replace(run, out=run.out.with_name("every")).change(log_every=1)
    every.train()
    losses = [row["loss"] for row in rows_of(every) if "loss" in row]
    assert len(losses) == 10
    assert logged[0]["loss"] == pytest.approx(sum(losses) / 10, rel=1e-6)


def rows_of(run):
    return [json.loads(line) for line in (run.out / "metrics.jsonl").read_text().splitlines()]


def test_patience_that_runs_out_at_the_end_is_no_early_end(fine_tuning):
    run = replace(fine_tuning, evaluators=(Script(0.9, 0.1),), patience=10)
    assert run.train() == "finished"
    assert not run.state.stopped_early


@pytest.mark.parametrize("at", [5, 8])
def test_a_stopped_run_decides_as_one_that_never_stopped(fine_tuning, at):
    """At 8 the signal leaves no time for an evaluation that is due: the next start makes up for it, and ends there."""
    script = Script(0.1, 0.2, 0.9, 0.5, 0.8)
    straight = replace(fine_tuning, evaluators=(script,), patience=2)
    assert straight.train() == "early"
    assert straight.state.step == 8
    run = replace(straight, out=straight.out.with_name("stopped"))
    assert run.train(on_batch=run.interrupt(at, signal.SIGTERM)) == "stopped"
    assert run.train(resume=run.checkpoints()[-1]) == "early"
    assert run.state == straight.state
    kept, expected = (load_file(r.out / "best" / "model" / "model.safetensors") for r in (run, straight))
    assert all(torch.equal(v, expected[k]) for k, v in kept.items())
    weights, others = (load_file(r.checkpoints()[-1] / "model" / "model.safetensors") for r in (run, straight))
    assert all(torch.equal(v, others[k]) for k, v in weights.items())
    assert [(r["step"], r.get("loss")) for r in rows_of(run)] == [(r["step"], r.get("loss")) for r in rows_of(straight)]


@pytest.fixture
def stopped(fine_tuning):
    """Best at update 4; stopped after 7, with an evaluation without a better number behind it, and one to spare."""
    run = replace(fine_tuning, evaluators=(Script(0.1, 0.2, 0.9, 0.5, 0.8),), patience=2)
    assert run.train(on_batch=run.interrupt(7, signal.SIGTERM)) == "stopped"
    return run


def test_a_run_that_continues_in_another_folder_takes_its_best_model_along(stopped):
    """And decides as in its own: update 8 is the second that is not better."""
    other = replace(stopped, out=stopped.out.with_name("other"))
    assert other.train(resume=stopped.checkpoints()[-1]) == "early"
    assert (other.state.best_value, other.state.best_step, other.state.step) == (0.9, 4, 8)
    assert damage(other.out / "best") is None
    assert best_of(other) == best_of(stopped)
    assert [p.name for p in other.out.glob(".*")] == []


@pytest.mark.parametrize("how", ["newer", "damaged", "absent"])
def test_a_best_model_that_is_another_is_left_behind_and_nothing_else_changes(stopped, how):
    if how == "newer":
        (checkpoint,) = stopped.checkpoints()
        shutil.copytree(stopped.out / "checkpoints", stopped.out.with_name("elsewhere"))
        replace(stopped, evaluators=(Script(0.95),)).train(resume=checkpoint)
        assert best_of(stopped)["step"] == 8
        shutil.copytree(stopped.out.with_name("elsewhere"), stopped.out / "checkpoints", dirs_exist_ok=True)
    elif how == "damaged":
        (stopped.out / "best" / "model" / "config.json").write_text("{}")
    else:
        shutil.rmtree(stopped.out / "best")
    other = replace(stopped, out=stopped.out.with_name("other"))
    assert other.train(resume=stopped.out / "checkpoints" / "step_00000007") == "early"
    assert (other.state.best_value, other.state.best_step, other.state.step) == (0.9, 4, 8)
    assert not (other.out / "best").exists()


def test_a_kill_between_the_two_renames_keeps_the_former_best(stopped):
    before = best_of(stopped)
    (stopped.out / "best").rename(stopped.out / ".trash_best")
    assert stopped.train(resume=stopped.checkpoints()[-1]) == "early"
    assert best_of(stopped) == before
    assert damage(stopped.out / "best") is None


def test_what_a_kill_left_behind_is_no_hindrance(fine_tuning):
    for name in (".tmp_best", ".trash_best"):
        (fine_tuning.out / name / "model").mkdir(parents=True)
    run = replace(fine_tuning, evaluators=(Script(*range(11)),))
    run.train()
    assert best_of(run)["step"] == 20
    assert [p.name for p in run.out.glob(".*")] == []


def test_a_full_disk_keeps_the_best_so_far_and_says_so(fine_tuning, monkeypatch):
    run = replace(fine_tuning, evaluators=(Script(*range(11)),))
    real = Path.write_text

    def full(self, text, **kwargs):
        if self.name == "best.json" and '"step": 6' in text:
            raise OSError(28, "No space left on device")
        return real(self, text, **kwargs)

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(RuntimeError, match=r"the best model could not be written to .*No space left.*same command"):
        run.train()
    assert best_of(run)["step"] == 4
    assert damage(run.out / "best") is None


def test_a_checkpoint_from_before_there_was_a_best_can_be_read(fine_tuning):
    fine_tuning.train()
    path = fine_tuning.checkpoints()[0] / "training_state" / "state.json"
    saved = json.loads(path.read_text())
    for name in ("best_value", "best_step", "evaluations_since_best", "stopped_early"):
        del saved["state"][name]
    path.write_text(json.dumps(saved))
    loaded = load_checkpoint(
        fine_tuning.checkpoints()[0], task=fine_tuning.task, optimizer=fine_tuning.optimizer.optimizer, average=None
    )
    assert loaded.state.best_value is None
    assert not loaded.state.stopped_early


def test_rows_of_evaluations_do_not_change_what_the_verdict_looks_at(fine_tuning):
    fine_tuning.train()
    assert "top1" not in fine_tuning.monitor.last
    assert fine_tuning.monitor.last["step"] == 20
    assert "loss" in fine_tuning.monitor.last
    assert "eval_images_per_second" in TIMES


def test_the_verdict_names_its_baseline(fine_tuning):
    fine_tuning.train()
    monitor = fine_tuning.monitor
    monitor.baseline, monitor.last = "guessing by class frequency", {"loss": 0.5, "step": 20}
    assert monitor.verdict() == "learning: loss 0.5000 at step 20 is 50% below guessing by class frequency 1.0000"
    monitor.last = {"loss": 0.99, "step": 20}
    assert "not clearly below 1.0000, the loss of guessing by class frequency." in monitor.verdict()


def test_evaluations_are_not_made_of_a_loss_that_is_not_finite(fine_tuning):
    """Else a broken model could become the best between two log steps."""
    run = replace(fine_tuning, evaluators=(Script(*range(11)),)).change(log_every=0, save_every=0)

    class Poisoned:
        seconds_waiting = 0.0

        def count_bad(self, samples):
            assert samples == []

        def __iter__(self):
            for batch in run.read(0, 0, 1):
                if batch.cursor == 3:
                    batch.values["mix_lam"] = batch.values["mix_lam"] * math.nan
                yield batch

    with pytest.raises(FloatingPointError, match="update 3"):
        replace(run, batches=Poisoned()).train()
    assert best_of(run)["step"] == 2
    shutil.rmtree(run.out)
