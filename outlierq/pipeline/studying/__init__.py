"""What `outlierq study` measures with: who takes part, and models with approximated weights."""
