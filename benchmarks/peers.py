"""What pip brings to send changed weights, each as a `Codec` of `benchmarks/codecs.py`; or why it is not measured.

The extra `bench` installs them. All but the first compare old and new weights themselves, so encoding is publishing.
"""

import importlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from deltawire.weights.bits import Bits, UInts
from deltawire.weights.delta import Delta

Weights = dict[str, Bits]


class Step(NamedTuple):
    """One step of a trace: the weights before and after, by name and end to end, and the change."""

    old: Weights
    new: Weights
    flat_old: UInts
    flat_new: UInts
    delta: Delta


class Codec(NamedTuple):
    """Encode gives bytes; decode gives the delta, or the new weights end to end. `publish` compares and encodes; None
    where encode does both."""

    name: str
    encode: Callable[[], Any]
    decode: Callable[[Any], Any]
    size: Callable[[Any], int] = len
    publish: Callable[[], Any] | None = None


def layouts(step: Step) -> Iterator[Codec]:
    """What needs no package of its own: six bytes a change, as vLLM, verl and TRL send it, and XOR with zstd, as slime
    and SkyRL do."""
    import zstandard

    def six(delta: Delta) -> list[tuple[UInts, UInts]]:
        found = ((change.sparse()[0], step.new[name].data) for name, change in delta.items())
        return [(positions.astype(np.int32), new[positions]) for positions, new in found]

    def put(changes: list[tuple[UInts, UInts]]) -> UInts:
        new = {name: bits.data.copy() for name, bits in step.old.items()}
        for name, (positions, values) in zip(step.delta, changes, strict=True):
            new[name][positions] = values
        return np.concatenate([bits.view(np.uint16) for bits in new.values()])

    yield Codec(
        "6 bytes a change",
        lambda: six(step.delta),
        put,
        lambda found: sum(positions.nbytes + values.nbytes for positions, values in found),
        lambda: six(Delta.between(step.old, step.new)),
    )
    yield Codec(
        "XOR + zstd-1",
        lambda: zstandard.ZstdCompressor(1).compress((step.flat_old ^ step.flat_new).data),
        lambda data: np.frombuffer(zstandard.ZstdDecompressor().decompress(data), np.uint16) ^ step.flat_old,
    )


def z4ai(step: Step) -> Iterator[Codec]:
    """z4ai's delta of one buffer."""
    delta = importlib.import_module("z4ai.delta")
    old, new = step.flat_old.tobytes(), step.flat_new.tobytes()
    yield Codec(
        "z4ai",
        lambda: delta.compress(new, reference=old, dtype="bf16"),
        lambda data: np.frombuffer(delta.decompress(data, reference=old), np.uint16),
    )


def fireworks(step: Step) -> Iterator[Codec]:
    """Fireworks' formats of a dict of tensors. What arc_v3 writes depends on what its threads finish first."""
    arc, torch = importlib.import_module("fireworks_delta_compression"), importlib.import_module("torch")
    sides = (step.old, step.new)
    old, new = ({name: torch.from_numpy(bits.data.copy()) for name, bits in side.items()} for side in sides)
    for form in ("arc_v2", "arc_v3"):

        def decode(found: Any, form: str = form) -> UInts:
            sides = ((old[name], diff, found[1][name]) for name, diff in found[0].items())
            parts = [
                arc.delta_decompress(src=src, compressed_diff=diff, checksum=checksum, compression_format=form)
                for src, diff, checksum in sides
            ]
            return np.concatenate([part.contiguous().view(torch.uint8).numpy().view(np.uint16) for part in parts])

        yield Codec(
            f"fireworks {form}",
            lambda form=form: arc.delta_compress_dicts(old, new, form),
            decode,
            lambda found: sum(diff.numel() for diff in found[0].values()),
        )


def modelexpress(step: Step) -> Iterator[Codec]:
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

    yield Codec("modelexpress", encode, decode, lambda frames: sum(frame.size for frame in frames if frame is not None))


def zipnn(step: Step) -> Iterator[Codec]:
    """ZipNN's delta of one buffer."""
    make = importlib.import_module("zipnn").ZipNN
    options = {"bytearray_dtype": "bfloat16", "input_format": "byte", "delta_compressed_type": "byte"}
    old, new = step.flat_old.tobytes(), step.flat_new.tobytes()
    yield Codec(
        "zipnn",
        lambda: make(**options).compress(new, delta_second_data=old),
        lambda data: np.frombuffer(make(**options).decompress(data, delta_second_data=old), np.uint16),
    )


PEERS = (z4ai, fireworks, modelexpress, zipnn)


def peers(step: Step) -> tuple[list[Codec], dict[str, str]]:
    """The codecs that are installed; by name, why another is not measured."""
    found, missing = [], {}
    for peer in PEERS:
        try:
            found += peer(step)
        except ImportError as error:
            missing[peer.__name__] = f"not installed ({error}): pip install 'deltawire[bench]'"
    return found, missing
