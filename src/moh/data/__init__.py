"""Data on the ground floor: texts, tokens and pixels, with nothing of a network."""
