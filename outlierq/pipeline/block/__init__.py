"""What happens to one block: where its statistics come from, folds, experts, cache, rounding."""
