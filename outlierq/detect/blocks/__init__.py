"""Measures of what passes between blocks, and of attention."""
