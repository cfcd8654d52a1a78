"""Steps as bytes and back, one codec per file.

A codec turns one TensorDelta into named byte streams and back:

    encode(delta) -> {suffix: Stream}          decode(streams, spec) -> TensorDelta

`raw` and `class` need the old weights both ways. `dense` is not chosen by name: the other codecs fall back to it, per
tensor, where it is smaller. `subset` and `class` share one module: their streams are tiles of nested lists.
"""
