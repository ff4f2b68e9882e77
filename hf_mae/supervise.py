"""Supervised training of timm's models from a recipe: ResNet strikes back, the ReXNet birds, one's own data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import ClassVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from hf_mae.data.augment import check_augment
from hf_mae.data.order import DROP_PATH, DROPOUT
from hf_mae.data.sources import Source
from hf_mae.labelled import LabelledTraining, Noise, together
from hf_mae.models.configuration_mae import height_width
from hf_mae.models.timm_models import checkpoint_blocks, compile_features, create, drop_paths, from_weights
from hf_mae.models.timm_spec import TimmSpec
from hf_mae.recipes.defaults import Chosen
from hf_mae.recipes.supervised import SuperviseRecipe, check_supervise
from hf_mae.run import model_folder, run
from hf_mae.training.loop import Evaluator
from hf_mae.training.monitors import Printer
from hf_mae.training.optim import MovingAverage, build_optimizer
from hf_mae.training.origins import lineage_of
from hf_mae.training.tasks import TimmClassification


def supervise(recipe: SuperviseRecipe, *, chosen: Chosen = None) -> Path:
    """Train a model of timm, or continue the run in `recipe.out`.

    Everything a user can get wrong is checked before the first update. A collective: every process calls it.

    Args:
        recipe: what to do.
        chosen: names of its fields that have to stay; the others may be adapted to the data, which is said. None: all.

    Returns:
        The run folder. `checkpoints/` has the last model, `best/` the best one, in timm's format.

    Raises:
        ValueError: something in the recipe, the data or the run folder has to be changed; the message says what.
        RuntimeError: the run met something it cannot go on with; the message names the last good checkpoint.
    """
    check_supervise(recipe)
    check_augment(recipe.augment)
    return run(SupervisedTraining(recipe), chosen)


class SupervisedTraining(LabelledTraining[SuperviseRecipe]):
    """A model of timm, from scratch or from other weights; all of it is trained."""

    forward_methods = ("features", "logits")
    load_with: ClassVar[str] = "transformers.AutoModelForImageClassification.from_pretrained"

    def find_weights(self) -> None:
        """Refuse weights that are not there."""
        if self.recipe.init_from:
            _weights(self.recipe.init_from)

    def build(self, source: Source, resume_from: Path | None, accelerator: Accelerator, say: Printer) -> nn.Module:
        """Return the task: a new model, or one that starts from `init_from`; a checkpoint's weights come later."""
        recipe, wish = self.recipe, self.recipe.model
        self.image_size, self.channels = height_width(wish.image_size), wish.num_channels
        spec = TimmSpec(
            architecture=wish.architecture,
            names=tuple(self.names),
            image_size=self.image_size,
            test_image_size=height_width(wish.image_size if wish.test_image_size is None else wish.test_image_size),
            crop_pct=wish.crop_pct,
            channels=self.channels,
            drop_path_rate=wish.drop_path_rate,
            mean=tuple(recipe.augment.mean),
            std=tuple(recipe.augment.std),
            loss=recipe.loss.name,
        )
        self.test_size, self.crop_pct = spec.test_image_size, spec.crop_pct
        self.warn_of_loss(say)
        if recipe.init_from and resume_from is None:
            weights = _weights(recipe.init_from)
            model, kept = from_weights(weights, spec)
            self.origin = {"init_from": str(weights)}
            if accelerator.is_main_process:  # which writes it down, and may have to ask the Hub
                self.origin["lineage"] = lineage_of(recipe.init_from)
            say(f"weights: {weights}; the head keeps {len(kept)} of {len(self.names)} classes")
        else:
            model = create(spec)
            say(f"weights: new ({wish.architecture} from scratch)")
        parameters = sum(p.numel() for p in model.parameters())
        if wish.max_parameters is not None and parameters > wish.max_parameters:
            raise ValueError(
                f"model.architecture={wish.architecture} has {parameters:,} parameters with {len(self.names)} classes, "
                f"more than model.max_parameters={wish.max_parameters:,}; take a smaller one, or leave the limit out"
            )
        if recipe.engine.checkpoint_activations == "blocks":
            checkpoint_blocks(model)
        if recipe.engine.compile:
            compile_features(model)
        self.num_drop_paths = len(drop_paths(model))
        task = TimmClassification(
            model,
            spec,
            loss=recipe.loss,
            label_smoothing=recipe.augment.label_smoothing,
            drop_rate=wish.drop_rate,
            augment=recipe.augment,
        )
        self.num_features = task.num_features
        return task

    def optimizer(self, task: nn.Module) -> torch.optim.Optimizer:
        """Return the recipe's optimizer, with timm's parameter groups."""
        assert isinstance(task, TimmClassification)
        return build_optimizer(task.model, self.recipe.optim, num_layers=None)

    def extras(self, images_per_epoch: int) -> Callable[..., Mapping[str, Tensor]] | None:
        """Return what draws stochastic depth, dropout and mixing."""
        draws, recipe = self.mixing(images_per_epoch), self.recipe
        if self.num_drop_paths:
            draws.append(Noise("drop_path_noise", self.num_drop_paths, recipe.seed, DROP_PATH))
        if recipe.model.drop_rate > 0:
            draws.append(Noise("dropout_noise", self.num_features, recipe.seed, DROPOUT))
        return together(draws)

    def sample(self, n: int) -> dict[str, Tensor]:
        """Return n black images of the first class."""
        batch = {
            "pixel_values": torch.zeros(n, self.channels, *self.image_size, dtype=torch.uint8),
            "labels": torch.zeros(n, dtype=torch.int64),
        }
        if self.num_drop_paths:
            batch["drop_path_noise"] = torch.ones(n, self.num_drop_paths)
        if self.recipe.model.drop_rate > 0:
            batch["dropout_noise"] = torch.ones(n, self.num_features)
        return batch

    def evaluators(
        self, out: Path, inner: nn.Module, average: MovingAverage | None, accelerator: Accelerator, say: Printer
    ) -> list[Evaluator]:
        """Return accuracy and calibration on the test split."""
        test = self.whole_test(accelerator)
        return [] if test is None else [self.quality(test, test, out, average, accelerator)]


def _weights(name: str) -> Path | str:
    """Return where the weights of a timm model are: a folder of a run, a folder in timm's format, a Hub id or a name.

    Raises:
        ValueError: a path that does not exist or holds no model.
    """
    path = Path(name).expanduser()
    if path.exists() or name.startswith((".", "/", "~", "runs/")):
        return model_folder(name, field="init_from")
    return name
