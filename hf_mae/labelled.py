"""Training on labels: what all kinds of classification share, whatever the model."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from hf_mae.data.examples import check_pixels
from hf_mae.data.labels import check_labels
from hf_mae.data.order import uniforms
from hf_mae.data.sources import SPLIT_NAMES, Source, list_splits, open_source
from hf_mae.data.whole import WholeSplit
from hf_mae.evaluation.charts import draw_learning
from hf_mae.evaluation.classification import ClassificationQuality, chosen_on
from hf_mae.evaluation.report import Drawing
from hf_mae.recipes.classification import LabelledRecipe
from hf_mae.run import Training, last_model
from hf_mae.training.best import Best
from hf_mae.training.checkpoint import TrainState
from hf_mae.training.distributed import agree
from hf_mae.training.losses import check_loss
from hf_mae.training.mixing import MixDraws
from hf_mae.training.monitors import Printer
from hf_mae.training.optim import MovingAverage, describe_groups
from hf_mae.training.schedules import Plan
from hf_mae.training.tasks import LabelledTask

EVAL_BATCH = 64
"""Images of an evaluation's forward pass, per process."""

L = TypeVar("L", bound=LabelledRecipe)


class LabelledTraining(Training[L]):
    """A model with a head for the classes of the data, judged on a labelled split.

    Attributes:
        load_with: the function that loads a model folder of such a run, for its users.
        test_size: (height, width) of test pictures where it is not `image_size`; known after `build`.
        crop_pct: of test pictures, see `hf_mae.data.whole.WholeSplit`; known after `build`.
    """

    load_with: ClassVar[str]
    test_size: tuple[int, int] | None = None
    crop_pct: float | None
    baseline = "guessing by the frequency of the classes"

    def labels(self, source: Source, say: Printer) -> dict[str, Any]:
        """Refuse labels that cannot be trained on; find the split to test on."""
        self.source = source
        self.test_images: WholeSplit | None = None
        self.test = self._test_split(source, say)
        classes = check_labels(source, self.test, self.recipe.data)
        for note in classes.notes:
            say(note)
        self.names = list(classes.names)
        self.num_classes = len(self.names)
        return {"classes": self.names, "test_images": self.test.fingerprint if self.test is not None else None}

    def _test_split(self, source: Source, say: Printer) -> Source | None:
        data, evals = replace(self.recipe.data, revision=source.revision), self.recipe.evals  # the same commit
        usual = [name for kind in ("validation", "test") for name in SPLIT_NAMES[kind]]
        splits = [evals.split] if evals.split is not None else [s for s in usual if s in list_splits(data)]
        for split in splits:
            test = open_source(data, split=split, field="evals.split")
            if test.where != source.where:
                check_pixels(test, data, refuse=False)  # what is trained on was looked at before
                say(f"testing on {test.summary().removeprefix('data: ')}")
                self.tested_on = split
                return test
            if evals.split is not None:
                raise ValueError(
                    f"evals.split={split} is what is trained on ({source.where}); testing on it measures memory, name "
                    "another"
                )
        if evals.patience is not None:
            raise ValueError(
                f"evals.patience={evals.patience} needs a split to test on and none was found; name one with "
                "--evals.split, or leave the patience out"
            )
        say("no validation or test split was found (--evals.split names one): nothing is measured but the loss")
        return None

    def warn_of_loss(self, say: Printer) -> None:
        """Refuse targets that say nothing; warn of settings of the loss that do not do what they seem to.

        Raises:
            ValueError: as `check_loss`.
        """
        for warning in check_loss(self.recipe.loss, self.recipe.augment.label_smoothing, len(self.names)):
            say(f"warning: {warning}")

    def describe(self, optimizer: torch.optim.Optimizer, plan: Plan) -> list[str]:
        """Return the learning rate of each group, and whether the best model is chosen from few evaluations."""
        lines, every = describe_groups(optimizer, plan.lr), self.recipe.eval_every
        if self.test is not None and every > 1.5 * plan.steps_per_epoch and plan.total_steps < 10 * every:
            lines.append(
                f"note: {-(-plan.total_steps // every)} evaluation(s), one every {every / plan.steps_per_epoch:.1f} "
                f"epochs, choose the best model; --eval-every {round(plan.steps_per_epoch)} is one an epoch"
            )
        return lines

    def mixing(self, images_per_epoch: int) -> list[Callable[..., Mapping[str, Tensor]]]:
        """Return what draws mixup and cutmix, if anything does."""
        recipe = self.recipe
        if not recipe.mixes_pairs:
            return []
        return [
            MixDraws(
                recipe.augment,
                recipe.seed,
                size=self.image_size,
                images=recipe.global_batch // recipe.data.repeats,
                length=images_per_epoch,
                repeats=recipe.data.repeats,
            )
        ]

    def whole(self, source: Source, accelerator: Accelerator) -> WholeSplit:
        """Return every image of a split once, as evaluation sees it."""
        return WholeSplit(
            source,
            image_size=self.test_size or self.image_size,
            crop_pct=self.crop_pct,
            channels=self.channels,
            batch=EVAL_BATCH,
            rank=accelerator.process_index,
            world=accelerator.num_processes,
            num_workers=max(1, self.recipe.num_workers),
            max_pixels=self.recipe.data.max_pixels,
        )

    def whole_test(self, accelerator: Accelerator) -> WholeSplit | None:
        """Return every image to test on, if there are any. A collective: call it on all ranks.

        Raises:
            ValueError: none of them can be decoded: the run would end at its first evaluation.
            RuntimeError: the main process has found that.
        """
        if self.test is None:
            return None
        test, error = self.whole(self.test, accelerator), None
        if accelerator.is_main_process:
            try:
                test.check()
            except (ValueError, RuntimeError, OSError) as caught:
                error = caught
        agree(error, accelerator, "looking at the images to test on")
        return test

    def quality(
        self, batches: Any, test: WholeSplit, out: Path, average: MovingAverage | None, accelerator: Accelerator
    ) -> ClassificationQuality:
        """Return the evaluator of accuracy and calibration; `batches` are of `test`, as images or as features."""
        self.test_images = test
        drawing = Drawing(self.names, test.picture, test.num_rows, out / "pictures", accelerator)
        return ClassificationQuality(
            batches,
            self.names,
            accelerator,
            every=self.recipe.eval_every,
            at_start=self.recipe.evals.at_start,
            average=average,
            out=out,
            about={"split": self.tested_on, "note": chosen_on(self.recipe.evals.best, str(self.tested_on))},
            draw=drawing if self.recipe.evals.pictures else None,
        )

    def baseline_loss(self, inner: nn.Module) -> float:
        """Return the loss of guessing by the classes' frequencies, or by even ones where counting means reading."""
        assert isinstance(inner, LabelledTask)
        labels = self.source.all_labels()
        if labels is None or not (labels >= 0).any():
            labels = np.arange(len(self.names))
        return inner.trivial_loss(torch.from_numpy(labels[labels >= 0]), self.recipe.augment, self.image_size)

    def judge(
        self, out: Path, task: nn.Module, average: MovingAverage | None, accelerator: Accelerator
    ) -> Callable[[Mapping[str, float], TrainState], bool] | None:
        """Return what keeps the best model."""
        if self.test is None:
            return None
        evals = self.recipe.evals
        return Best(
            out / "best",
            metric=evals.best,
            accelerator=accelerator,
            task=task,
            average=average,
            patience=evals.patience,
        )

    def report(self, out: Path, rows: list[dict[str, Any]], verdict: str, say: Printer) -> None:
        """Say what came out, and what to do next."""
        say(verdict)
        for name, title in (
            ("top1", "top-1"),
            ("ema_top1", "top-1 of the averaged weights"),
            ("knn_top1", "kNN (k = 20, T = 0.07)"),
            ("knn_plain_top1", "kNN (k = 20, plain vote)"),
            ("logistic_top1", "logistic regression"),
        ):
            values = [(row[name], row["step"]) for row in rows if name in row]
            if values:
                top, step = max(values, key=lambda value: value[0])
                chosen = f", the best of {len(values)} on {self.tested_on}: optimistic" if self.tested_on else ""
                best = f"; best {top:.4f} at step {step}{chosen}" if len(values) > 1 else ""
                say(f"{title}: {values[-1][0]:.4f} on {len(self.names)} classes{best}")
        evaluations = sum(self.recipe.evals.best in row for row in rows)
        if self.tested_on in SPLIT_NAMES["test"] and evaluations > 1:
            say(
                f"note: {out / 'best'}: {chosen_on(self.recipe.evals.best, str(self.tested_on))}, and it is the "
                "test split, so no images are left that chose nothing; choose by a validation split (--evals.split "
                "or --data.splits stratified:80/10/10), then measure on the test split with hf-mae evaluate"
            )
        if self.test_images is not None and (bad := self.test_images.bad):
            say(f"warning: {len(bad)} test images of this process cannot be decoded and were left out: {bad[0]} ...")
        if self.recipe.evals.pictures and self.test_images is not None:
            draw_learning({self.recipe.name: rows}, out / "pictures" / "learning.png")
        if pictures := sorted((out / "pictures").glob("*.png")):
            say(f"pictures: {', '.join(p.name for p in pictures)} in {out / 'pictures'}")
        if model := last_model(out):
            say(f"model: {model}, load it with {self.load_with}({json.dumps(str(model), ensure_ascii=False)})")
            say(f"on the Hub: hf-mae publish {shlex.quote(str(out))} ORG/NAME --license LICENCE --dry-run")


class Noise:
    """Draws numbers for each sample from (seed, epoch, position): {name: float32 [n, draws]} in [0, 1).

    Args:
        name: of the tensor in the batch.
        draws: numbers for each sample.
        seed: the run's.
        purpose: see `hf_mae.data.order.uniforms`.
    """

    def __init__(self, name: str, draws: int, seed: int, purpose: int):
        self.name, self.draws, self.seed, self.purpose = name, draws, seed, purpose

    def __call__(self, epochs: np.ndarray, positions: np.ndarray) -> dict[str, Tensor]:
        """Return the draws of the samples at these places of the stream."""
        drawn = uniforms(self.draws, self.seed, epochs, positions, self.purpose)
        return {self.name: torch.from_numpy(drawn).float()}


def together(draws: Sequence[Callable[..., Mapping[str, Tensor]]]) -> Callable[..., Mapping[str, Tensor]]:
    """Return one function that makes the tensors of all of them."""

    def all_draws(epochs: Any, positions: Any) -> dict[str, Tensor]:
        return {name: tensor for draw in draws for name, tensor in draw(epochs, positions).items()}

    return all_draws
