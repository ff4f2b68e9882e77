"""Model cards: every sentence and number from the records of a run, checked before anything is published."""

from hf_mae.cards.options import CardOptions
from hf_mae.cards.usage import run_usage, usage_blocks
from hf_mae.cards.validate import validate_card
from hf_mae.cards.write import write_card

__all__ = ["CardOptions", "run_usage", "usage_blocks", "validate_card", "write_card"]
