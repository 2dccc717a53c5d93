"""Stage 3, detect: where a model's outliers are and what they will cost. One file per measure, each with its source."""
