"""What transformers makes of stored tensors as it loads them: splits, joins and renames, and what goes wrong then."""
