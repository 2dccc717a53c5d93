"""Rotations and scales of a whole model that are learned, or made of what its inputs are."""
