"""Masked autoencoders for the Hugging Face ecosystem.

Importing the package registers its classes with `AutoConfig`, `AutoModel`, `AutoModelForPreTraining` and
`AutoModelForImageClassification`.
"""

import importlib
import sys
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from hf_mae.threads import limit_spinning

limit_spinning()  # before anything imports torch

__version__ = "0.1.0"

_HOMES = {
    "MAEConfig": "hf_mae.models.configuration_mae",
    "MAEForImageClassification": "hf_mae.models.modeling_classification",
    "MAEForPreTraining": "hf_mae.models.modeling_mae",
    "MAEModel": "hf_mae.models.modeling_mae",
    "convert_state_dict": "hf_mae.models.convert",
    "export": "hf_mae.exporting.write",
    "reconstruct": "hf_mae.evaluation.reconstruction",
}

# The `hf-mae` command answers --help, --list and plan without torch and transformers, which take seconds to import: in
# that process the classes are imported, and so registered, when one is first used. Everywhere else it happens here, as
# AutoModel cannot ask for it.
_IS_COMMAND = PurePath(sys.argv[0] if getattr(sys, "argv", None) else "").stem == "hf-mae"

if TYPE_CHECKING:
    from hf_mae import metrics as metrics
    from hf_mae.exporting.write import export

if TYPE_CHECKING or not _IS_COMMAND:
    from hf_mae.evaluation.reconstruction import reconstruct
    from hf_mae.models.configuration_mae import MAEConfig
    from hf_mae.models.convert import convert_state_dict
    from hf_mae.models.modeling_classification import MAEForImageClassification
    from hf_mae.models.modeling_mae import MAEForPreTraining, MAEModel

__all__ = [
    "MAEConfig",
    "MAEForImageClassification",
    "MAEForPreTraining",
    "MAEModel",
    "__version__",
    "convert_state_dict",
    "export",
    "reconstruct",
]


def __getattr__(name: str) -> Any:
    if name == "metrics":  # a room that nobody has imported yet: it needs `evaluate`, which takes a second
        return importlib.import_module("hf_mae.metrics")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
