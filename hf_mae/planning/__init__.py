"""Room 6: what a run will take on hardware that is not at hand. Arithmetic, without torch; nothing is measured."""
