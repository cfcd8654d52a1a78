"""From a trainer's tensors to a checkpoint's: other names, fp8. Functions for `Publisher(prepare=…)`."""
