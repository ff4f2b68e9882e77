"""Room 4: how a number or a picture is made from a model."""
