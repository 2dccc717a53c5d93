"""The tokens that a model is calibrated on."""
