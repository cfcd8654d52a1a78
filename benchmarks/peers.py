"""What pip brings to send changed weights, and the layouts of others, each as a `Codec` of a step.

The extra `bench` installs the packages. All but `six` compare old and new weights themselves, so encoding is
publishing.
"""

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from deltawire.weights.bits import UInts
from deltawire.weights.delta import Delta
from measuring import Codec
from steps import Step


def six(step: Step) -> Codec:
    """Six bytes a change, as vLLM, verl and TRL send it."""

    def arrays(delta: Delta) -> list[tuple[UInts, UInts]]:
        found = ((change.sparse()[0], step.new[name].data) for name, change in delta.items())
        return [(positions.astype(np.int32), new[positions]) for positions, new in found]

    def put(changes: list[tuple[UInts, UInts]]) -> UInts:
        new = {name: bits.data.copy() for name, bits in step.old.items()}
        for name, (positions, values) in zip(step.delta, changes, strict=True):
            new[name][positions] = values
        return np.concatenate([bits.view(np.uint16) for bits in new.values()])

    return Codec(
        lambda: arrays(step.delta),
        put,
        lambda found: sum(positions.nbytes + values.nbytes for positions, values in found),
        lambda: arrays(Delta.between(step.old, step.new)),
    )


def xor(step: Step) -> Codec:
    """XOR with zstd, as slime and SkyRL do."""
    import zstandard

    return Codec(
        lambda: zstandard.ZstdCompressor(1).compress((step.flat_old ^ step.flat_new).data),
        lambda data: np.frombuffer(zstandard.ZstdDecompressor().decompress(data), np.uint16) ^ step.flat_old,
    )


def z4ai(step: Step) -> Codec:
    """z4ai's delta of one buffer."""
    delta = importlib.import_module("z4ai.delta")
    old, new = step.flat_old.tobytes(), step.flat_new.tobytes()
    return Codec(
        lambda: delta.compress(new, reference=old, dtype="bf16"),
        lambda data: np.frombuffer(delta.decompress(data, reference=old), np.uint16),
    )


def fireworks(step: Step, form: str) -> Codec:
    """A format of Fireworks, of a dict of tensors. What arc_v3 writes depends on what its threads finish first."""
    arc, torch = importlib.import_module("fireworks_delta_compression"), importlib.import_module("torch")
    sides = (step.old, step.new)
    old, new = ({name: torch.from_numpy(bits.data.copy()) for name, bits in side.items()} for side in sides)

    def decode(found: Any) -> UInts:
        sides = ((old[name], diff, found[1][name]) for name, diff in found[0].items())
        parts = [
            arc.delta_decompress(src=src, compressed_diff=diff, checksum=checksum, compression_format=form)
            for src, diff, checksum in sides
        ]
        return np.concatenate([part.contiguous().view(torch.uint8).numpy().view(np.uint16) for part in parts])

    return Codec(
        lambda: arc.delta_compress_dicts(old, new, form),
        decode,
        lambda found: sum(diff.numel() for diff in found[0].values()),
    )


def modelexpress(step: Step) -> Codec:
    """ModelExpress' XOR of each tensor, as a frame of zstd."""
    import zstandard

    utils = importlib.import_module("modelexpress_rl.utils")
    old, new = ({name: bits.data.view(np.uint8) for name, bits in side.items()} for side in (step.old, step.new))

    def encode() -> list[UInts | None]:
        deltas = (utils.compute_delta(new[name], old[name])[0] for name in old)
        return [None if delta is None else utils.compress_delta(delta) for delta in deltas]

    def decode(frames: list[UInts | None]) -> UInts:
        parts = [
            bits if frame is None else bits ^ np.frombuffer(zstandard.ZstdDecompressor().decompress(frame), np.uint8)
            for bits, frame in zip(old.values(), frames, strict=True)
        ]
        return np.concatenate(parts).view(np.uint16)

    return Codec(encode, decode, lambda frames: sum(frame.size for frame in frames if frame is not None))


def zipnn(step: Step) -> Codec:
    """ZipNN's delta of one buffer."""
    make = importlib.import_module("zipnn").ZipNN
    options = {"bytearray_dtype": "bfloat16", "input_format": "byte", "delta_compressed_type": "byte"}
    old, new = step.flat_old.tobytes(), step.flat_new.tobytes()
    return Codec(
        lambda: make(**options).compress(new, delta_second_data=old),
        lambda data: np.frombuffer(make(**options).decompress(data, delta_second_data=old), np.uint16),
    )


PEERS: dict[str, Callable[[Step], Codec]] = {
    "6 bytes a change": six,
    "XOR + zstd-1": xor,
    "z4ai": z4ai,
    "fireworks arc_v2": partial(fireworks, form="arc_v2"),
    "fireworks arc_v3": partial(fireworks, form="arc_v3"),
    "modelexpress": modelexpress,
    "zipnn": zipnn,
}
