"""Live tensors of one worker process, patched in place. No inference engine is named here."""
