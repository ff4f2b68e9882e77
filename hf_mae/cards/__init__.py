"""Model cards: every sentence and number from the records of a run, checked before anything is published."""
