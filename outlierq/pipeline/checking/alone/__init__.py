"""What contradicts itself in a checkpoint, told without its source: one question a file."""
