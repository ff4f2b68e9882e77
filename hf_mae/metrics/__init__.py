"""Metrics as modules of `evaluate`: `hf_mae.metrics.TopKAccuracy()`, or `evaluate.load(path of the file)`, offline."""

from hf_mae.metrics.per_class_accuracy import PerClassAccuracy
from hf_mae.metrics.topk_accuracy import TopKAccuracy

__all__ = ["PerClassAccuracy", "TopKAccuracy"]
