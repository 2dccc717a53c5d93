"""Measures of weights: tails, spectra, outlier ratios."""
