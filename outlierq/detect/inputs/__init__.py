"""Measures of the inputs of linears: one file each, with its source."""
