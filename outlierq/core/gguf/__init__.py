"""Types of blocks of GGUF, and the mixes of them that have names."""
