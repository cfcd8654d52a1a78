"""Live tensors of one worker process, patched in place, whichever the inference engine."""
