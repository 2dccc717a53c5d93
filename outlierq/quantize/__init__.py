"""Stage 5, quantize: one file per method of rounding, each with its source, and the loop over a group's linears."""
