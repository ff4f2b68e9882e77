"""Recipes: what was run, as plain data."""
