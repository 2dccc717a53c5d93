"""What is measured on a model, and what was measured before."""
