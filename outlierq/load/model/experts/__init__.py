"""Experts of a mixture: how a class holds them, a proof of it, and one linear for each of their weights."""
