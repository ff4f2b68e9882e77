"""Room 2: where pixels come from, and in which order."""
