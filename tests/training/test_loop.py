"""The loop: accumulation, logging, non-finite losses, signals, and no waiting for the device."""

from __future__ import annotations

import json
import signal
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hf_mae.recipes.base import Optim
from hf_mae.training import loop
from hf_mae.training.checkpoint import TrainState


def rows(run):
    return [json.loads(line) for line in (run.out / "metrics.jsonl").read_text().splitlines()]


def test_accumulating_eight_micro_batches_equals_one_batch(toy, tmp_path):
    toy.train()
    other = replace(toy, out=tmp_path / "other", micro_batch=1)
    other.train()
    for a, b in zip(rows(toy), rows(other), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-6)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=2e-4)
    assert rows(toy)[-1]["step"] == 20


def test_rows_appear_at_every_nth_step_and_at_the_end(toy):
    assert toy.train() == "finished"
    assert [r["step"] for r in rows(toy)] == [3, 6, 9, 12, 15, 18, 20]
    assert rows(toy)[-1]["examples_seen"] == 160
    assert rows(toy)[2]["epoch"] == pytest.approx(9 / 5)


def test_a_row_holds_the_mean_loss_since_the_last_row(toy):
    toy.change(log_every=1).train()
    single = [r["loss"] for r in rows(toy)]
    grouped = replace(toy, out=toy.out.with_name("grouped"))
    grouped.train()
    assert rows(grouped)[0]["loss"] == pytest.approx(sum(single[:3]) / 3, rel=1e-6)
    assert rows(grouped)[-1]["loss"] == pytest.approx(sum(single[18:]) / 2, rel=1e-6)


def test_a_nan_stops_the_run_at_the_next_log_step_and_names_the_step(toy):
    run = replace(toy, poison=9)
    with pytest.raises(FloatingPointError, match=r"update 10 \(samples 72 to 79 of the stream\) is not finite"):
        run.train()
    # Step 12 would have been saved and logged; nothing after the last good checkpoint is.
    assert [c.name for c in run.checkpoints()] == ["step_00000004", "step_00000008"]
    assert rows(run)[-1]["step"] == 9


def test_a_nan_is_caught_before_a_checkpoint_even_between_log_steps(toy):
    run = replace(toy.change(log_every=0, save_every=4), poison=2)
    with pytest.raises(FloatingPointError, match="Last good checkpoint: none"):
        run.train()
    assert run.checkpoints() == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2])
def test_a_signal_saves_and_ends_the_run_cleanly(toy, number):
    assert toy.train(on_batch=toy.interrupt(7, number)) == "stopped"
    assert toy.state.step == 7
    assert toy.checkpoints()[-1].name == "step_00000007"
    first = replace(toy)
    first.train(resume=toy.checkpoints()[-1])
    straight = replace(toy, out=toy.out.with_name("straight"))
    straight.train()
    assert all(torch.equal(a, straight.weights()[k]) for k, a in first.weights().items())


def test_clipping_bounds_the_gradient_norm_and_reports_the_norm_before(toy):
    free = replace(toy, out=toy.out.with_name("free"))
    free.train()
    clipped = toy.change(optim=Optim(clip_grad=1e-4))
    clipped.train()
    assert rows(clipped)[0]["grad_norm"] == pytest.approx(rows(free)[0]["grad_norm"], rel=0.2)
    assert rows(clipped)[-1]["grad_norm"] > 1e-4


class CountSyncs(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.items = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default}:
            self.items += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("clip", [None, 1.0])
def test_no_step_waits_for_a_number_outside_log_and_save_steps(toy, monkeypatch, clip):
    """Each `.item()` or copy to the host would stall a GPU; only the one log step at the end may read numbers."""
    calls = []
    for name in ("cpu", "numpy", "tolist", "__array__"):
        there = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda self, *a, there=there, name=name: calls.append(name) or there(self, *a)
        )
    counts = []
    for steps in (5, 20):
        run = replace(toy, out=toy.out.with_name(f"run{steps}")).change(max_steps=steps, log_every=0, save_every=0)
        calls.clear()
        with CountSyncs() as counter:
            run.change(optim=Optim(clip_grad=clip)).train()
        counts.append(counter.items + len(calls))
    assert counts[0] == counts[1] > 0


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # dynamo looks at it (torch 2.14)
@pytest.mark.parametrize("what", ["none", "gelu", "blocks"])
def test_blocks_compiled_one_by_one_have_no_breaks_and_few_graphs(toy, what):
    """Regional compilation: one graph each for encoder, decoder and last decoder block; evaluations stay eager."""
    graphs, seen = [], []

    def count(graph_module, _):
        graphs.append(graph_module)
        return graph_module

    class Evaluate(Counting):
        def __call__(self, task, step):
            with torch.no_grad():
                seen.append(task.features(torch.zeros(1 + step, 3, 16, 16, dtype=torch.uint8)).shape[0])
            return super().__call__(task, step)

    toy = toy.change(engine=replace(toy.recipe.engine, compile=True, checkpoint_activations=what), max_steps=8)
    expected = replace(toy, out=toy.out.with_name("eager"), config={"decoder_num_hidden_layers": 2})
    expected.train()
    torch._dynamo.reset()
    run = replace(expected, out=toy.out, compile_backend=count, evaluators=(Evaluate(),))
    run.train()
    assert len(graphs) == 3
    assert len(seen) > 2
    assert [r["loss"] for r in rows(run) if "loss" in r] == pytest.approx([r["loss"] for r in rows(expected)], rel=1e-5)


def test_verdict_is_plain_in_both_directions(toy):
    toy.train()
    toy.monitor.last = {"loss": 0.5, "step": 20}
    assert toy.monitor.verdict().startswith("learning: loss 0.5000 at step 20 is 50% below")
    toy.monitor.last = {"loss": 0.999, "step": 20}
    assert toy.monitor.verdict().startswith("not learning: loss 0.9990")


class Counting:
    """An evaluator that records the steps it ran at."""

    def __init__(self):
        self.steps, self.finished = [], []

    def due(self, step, total):
        return step == 0 or step % 7 == 0 or step == total

    def __call__(self, task, step):
        assert not task.training
        self.steps.append(step)
        return {"seen": float(step)}

    def finish(self, task, step):
        self.finished.append(step)


def test_an_evaluation_that_a_signal_left_no_time_for_is_made_up_for(toy):
    first, second = Counting(), Counting()
    run = replace(toy, evaluators=(first,))
    assert run.train(on_batch=toy.interrupt(7, signal.SIGTERM)) == "stopped"
    assert first.steps == [0]
    replace(toy, evaluators=(second,)).train(resume=run.checkpoints()[-1])
    assert second.steps == [7, 14, 20]
    straight = replace(toy, out=toy.out.with_name("straight"), evaluators=(Counting(),))
    straight.train()
    clockless = [[{k: r[k] for k in ("step", "loss", "seen") if k in r} for r in rows(x)] for x in (run, straight)]
    assert clockless[0] == clockless[1]


def test_numbers_that_json_has_not_are_written_as_null(toy):
    class Strange(Counting):
        def __call__(self, task, step):
            return {"strange": float("nan")}

    replace(toy, evaluators=(Strange(),)).train()
    text = (toy.out / "metrics.jsonl").read_text()
    assert "NaN" not in text
    assert rows(toy)[0]["strange"] is None


class Fails(Counting):
    """An evaluator during which the run dies at one step."""

    def __init__(self, at):
        super().__init__()
        self.at = at

    def __call__(self, task, step):
        if step == self.at:
            raise MemoryError("as if killed")
        return super().__call__(task, step)


def clockless(run):
    return [{k: r[k] for k in ("step", "loss", "seen") if k in r} for r in rows(run)]


def test_evaluators_are_told_once_that_the_run_has_ended_and_is_saved(toy):
    class Looks(Counting):
        def finish(self, task, step):
            assert not task.training
            assert json.loads((toy.checkpoints()[-1] / "training_state" / "state.json").read_text())["state"] == {
                **vars(TrainState(trivial_loss=1.0, step=20, examples_seen=160))
            }
            super().finish(task, step)

    looks = Looks()
    replace(toy, evaluators=(looks,)).train()
    assert looks.finished == [20]
    stopped = Counting()
    run = replace(toy, out=toy.out.with_name("stopped"), evaluators=(stopped,))
    assert run.train(on_batch=toy.interrupt(9, signal.SIGTERM)) == "stopped"
    assert stopped.finished == []


def test_a_last_evaluation_that_fails_is_made_up_for(toy):
    """All 20 updates are in the checkpoint: the next start has nothing left to do but this evaluation."""
    straight = replace(toy, out=toy.out.with_name("straight"), evaluators=(Counting(),))
    straight.train()
    with pytest.raises(MemoryError):
        replace(toy, evaluators=(Fails(20),)).train()
    assert toy.checkpoints()[-1].name == "step_00000020"
    again = replace(toy, evaluators=(Counting(),))
    assert again.train(resume=toy.checkpoints()[-1]) == "finished"
    assert (again.evaluators[0].steps, again.evaluators[0].finished) == ([20], [20])
    assert again.state == straight.state
    assert not again.state.owes_evaluation
    assert clockless(again) == clockless(straight)
    assert replace(toy, evaluators=(Fails(20),)).train(resume=toy.checkpoints()[-1]) == "finished"


def test_an_owed_evaluation_whose_start_is_killed_leaves_one_row(toy):
    straight = replace(toy, out=toy.out.with_name("straight"), evaluators=(Counting(),)).change(save_every=0)
    straight.train()
    run = replace(straight, out=toy.out, evaluators=(Counting(),))
    assert run.train(on_batch=toy.interrupt(7, signal.SIGTERM)) == "stopped"
    with pytest.raises(MemoryError):
        replace(run, evaluators=(Fails(14),)).train(resume=run.checkpoints()[-1])
    assert run.checkpoints()[-1].name == "step_00000007"
    replace(run, evaluators=(Counting(),)).train(resume=run.checkpoints()[-1])
    assert clockless(run) == clockless(straight)


def test_training_rows_of_the_step_whose_evaluation_is_owed_stay(toy):
    straight = replace(toy, out=toy.out.with_name("straight"), evaluators=(Counting(),)).change(log_every=7)
    straight.train()
    run = replace(straight, out=toy.out, evaluators=(Counting(),))
    assert run.train(on_batch=toy.interrupt(7, signal.SIGTERM)) == "stopped"
    run.train(resume=run.checkpoints()[-1])
    assert clockless(run) == clockless(straight)


@pytest.mark.parametrize(("device", "waits"), [("cuda", False), ("mps", True), ("cpu", True)])
def test_only_copies_from_pinned_memory_to_cuda_are_not_waited_for(device, waits):
    """Anywhere else the memory may be used again before the copy is made."""

    class Seen:
        def __init__(self):
            self.pinned, self.options = False, []

        def is_pinned(self):
            return self.pinned

        def pin_memory(self):
            self.pinned = True
            return self

        def to(self, device, non_blocking=False):
            self.options.append(non_blocking)
            return self

    tensor = Seen()
    loop._to_device({"pixel_values": tensor}, torch.device(device))
    assert tensor.options == [not waits]
    assert tensor.pinned == (not waits)
