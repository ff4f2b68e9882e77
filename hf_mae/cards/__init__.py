"""Model cards: every sentence and number from the records of a run, checked before anything is published."""

from hf_mae.cards.options import CardOptions

__all__ = ["CardOptions"]
