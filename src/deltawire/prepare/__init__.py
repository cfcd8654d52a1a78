"""Functions for `Publisher(prepare=…)`: a trainer's tensors under a checkpoint's names and dtypes."""
