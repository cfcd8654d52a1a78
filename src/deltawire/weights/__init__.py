"""Tensors as bits: their changes, digests and inner loops, as pure functions without I/O or clock."""
