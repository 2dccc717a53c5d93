"""Models that are rewritten before they are compressed: rotated, pruned, given biases."""
