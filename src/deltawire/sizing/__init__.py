"""What a run will cost before it begins: bytes, seconds and requests, from measured constants, by pure functions."""
