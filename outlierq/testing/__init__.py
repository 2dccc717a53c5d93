"""Checkpoints with a known answer, to test methods on models whose outliers are where we put them."""
