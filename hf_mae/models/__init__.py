"""Room 1: what is computed. No data, no training."""
