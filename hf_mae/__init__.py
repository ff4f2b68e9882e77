"""Masked autoencoders for the Hugging Face ecosystem.

Importing the package registers its classes with `AutoConfig`, `AutoModel` and `AutoModelForPreTraining`.
"""

__version__ = "0.1.0"

from hf_mae.evaluation.reconstruction import reconstruct
from hf_mae.models.configuration_mae import MAEConfig
from hf_mae.models.convert import convert_state_dict
from hf_mae.models.modeling_mae import MAEForPreTraining, MAEModel

__all__ = ["MAEConfig", "MAEForPreTraining", "MAEModel", "__version__", "convert_state_dict", "reconstruct"]
