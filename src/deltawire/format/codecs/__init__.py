"""Steps as bytes and back, one codec per file.

A codec turns one TensorDelta into named byte streams and back:

    encode(delta) -> {suffix: Stream}          decode(streams, spec) -> TensorDelta

`raw` alone writes absolute values, so it needs the old weights both ways. `dense` is not chosen by name: the default
codec falls back to it, per tensor, where it is smaller.
"""
