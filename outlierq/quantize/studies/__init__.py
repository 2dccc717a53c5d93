"""Approximations of weights that no format holds: `outlierq study methods` compares them with the quantizers."""
