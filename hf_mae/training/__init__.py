"""Room 3: how a step is taken, saved and resumed."""
