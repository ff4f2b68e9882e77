"""A page that shows a model: on this machine (`hf-mae demo`) or as a Space (`hf-mae space`)."""
