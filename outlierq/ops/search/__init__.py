"""Searches for grids and scales by output error."""
