"""Compressed checkpoints, decoded with numpy alone: one file per layout, and the table of them."""
