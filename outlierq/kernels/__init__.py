"""CUDA kernels: sources, their packed layout, and thin launchers. Each kernel is defined by a torch twin in `ops`."""
