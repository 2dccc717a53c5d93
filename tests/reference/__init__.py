"""Slow, clear twins of the fast numerics: float64, one column or one code at a time, no blocks, no shortcuts."""
