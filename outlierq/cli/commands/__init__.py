"""One file a command. Heavy imports are inside the functions."""
