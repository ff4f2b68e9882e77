"""Names of classes: one for each row of the head, each of its own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import cast

from torch import nn

from hf_mae.models.modeling_classification import MAEForImageClassification
from hf_mae.models.timm_spec import timm_library


def timm_names(names: tuple[str, ...]) -> tuple[str, ...]:
    """Return the names of a timm model's classes, those of timm's own lists made unique: ImageNet has two cranes.

    Raises:
        ValueError: they are not unique, and written in the model's folder.
    """
    if len(set(names)) == len(names):
        return names
    subset = timm_library().data.infer_imagenet_subset({"num_classes": len(names)})
    if subset is None or names != tuple(timm_library().data.ImageNetInfo(subset).label_descriptions()):
        check_unique(names, "label_names in config.json")
    unique: dict[str, None] = {}
    for name in names:
        numbered = (f"{name}{n}" for n in range(2, len(names) + 2))
        unique[name if name not in unique else next(one for one in numbered if one not in unique)] = None
    return tuple(unique)


def check_names(model: MAEForImageClassification) -> None:
    """Refuse ids that are not the rows of the head, and names that mean several classes.

    Raises:
        ValueError: of either.
    """
    labels = cast("dict[int, str]", model.config.id2label)
    linear = model.head[-1] if isinstance(model.head, nn.Sequential) else model.head
    rows = cast(nn.Linear, linear).out_features
    if sorted(labels) != list(range(rows)):
        shown = [str(one) for one in sorted(labels)[:8]]
        raise ValueError(
            f"id2label has the ids {', '.join(shown)}{', ...' * (len(labels) > len(shown))} and the head has {rows} "
            f"rows; name the classes 0 to {rows - 1}"
        )
    check_unique(list(labels.values()), "id2label")


def check_unique(names: Sequence[str], where: str) -> None:
    """Refuse names that mean several classes.

    Raises:
        ValueError: a name occurs twice; `where` says where.
    """
    if twice := [name for name, times in Counter(names).items() if times > 1]:
        raise ValueError(
            f"{where} has several classes of the name {', '.join(map(repr, twice[:5]))}, which labels could not tell "
            "apart; give each class a name of its own"
        )
