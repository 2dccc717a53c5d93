"""Holding a checkpoint against the one it was made from: folds, orders and rotations are repeated or told first."""
