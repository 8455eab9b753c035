"""Whether machines and places are fit to train."""
