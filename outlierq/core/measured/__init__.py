"""Values that calibration and detection hand on: of blocks, logits, outliers, sensitivities."""
