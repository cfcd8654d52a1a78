"""Tensors as bits: their changes, digests and inner loops. Pure functions over numpy and torch: no I/O, no clock."""
