"""Arithmetic that stages and kernels share: grids, packing, solving, searching; pure functions of tensors."""
