"""Stage 4, transform: one file per method that changes numbers and not what they compute, each with its source."""
