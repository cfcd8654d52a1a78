"""One worker's live weights seen as checkpoint tensors: read them, digest them, find where an element lives."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch

from deltawire.bits import Bits, Positions, count, unsigned
from deltawire.digest import digest_bits
from deltawire.errors import EngineUnsupported
from deltawire.manifests import TensorEntry
from deltawire.vllm.boxes import Placement
from deltawire.vllm.memory import CARRIER, Memory, fingerprint
from deltawire.vllm.placement import probe


class LiveWeights:
    """The run's tensors where they live in this worker.

    Opening probes the model's loader, proves by digests that the probe wrote nothing, and refuses (EngineUnsupported)
    a model of which any tensor in the table cannot be patched in place: `transformed` names tensors that vLLM changed
    or made after loading, and what their modules hold does not qualify.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        table: Iterable[TensorEntry],
        *,
        transformed: Mapping[str, str],
        load_weights: Callable[[Iterator[tuple[str, torch.Tensor]]], object] | None = None,
    ) -> None:
        self.table = {entry.name: entry for entry in table}
        live = tensors_of(model)
        with _unchanged(model, live):
            placement = probe(self.table.values(), load_weights or model.load_weights, live)
        self.placement = _without(placement, live, _derived(live, transformed))
        self.placement.require(self.table)
        parameters = {box.parameter for boxes in self.placement.boxes.values() for box in boxes}
        self._memory = {name: Memory(live[name]) for name in parameters}

    def read(self, name: str) -> Bits:
        """One tensor's live bits, as the checkpoint would have them; a copy on the host."""
        entry = self.table[name]
        bits = Bits(entry.dtype, entry.shape, np.empty(count(entry.shape), unsigned(entry.dtype)))
        carrier = torch.from_numpy(bits.data.view(_carrier(bits.data.itemsize)))
        for view, box in self.rectangles(name):
            carrier.as_strided(box[0], box[2], box[1]).copy_(view)
        return bits

    def digest(self, name: str) -> int:
        """One tensor's digest, from live memory."""
        return digest_bits(self.read(name).data)

    def digests(self) -> dict[str, int]:
        """Every tensor's digest, from live memory: the full audit."""
        return {name: self.digest(name) for name in self.table}

    def rectangles(self, name: str) -> Iterator[tuple[torch.Tensor, tuple[tuple[int, ...], int, tuple[int, ...]]]]:
        """Writable views of live memory that make up a tensor, each with its place in the checkpoint tensor: shape,
        offset and strides in elements."""
        for box in self.placement.boxes.get(name, []):
            view = self._memory[box.parameter].view(box.shape, box.target_strides, box.target_offset)
            yield view, (box.shape, box.source_offset, box.source_strides)

    def locate(self, name: str, positions: Positions) -> Iterator[tuple[Memory, np.ndarray, Positions]]:
        """Where elements live: per storage, which of `positions` (a mask) and their offsets there. O(changed)."""
        for box in self.placement.boxes.get(name, []):
            inside, offsets = box.locate(positions)
            if offsets.size:
                yield self._memory[box.parameter], inside, offsets


def tensors_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Every tensor a model's modules hold, by its name: parameters, buffers, and plain attributes (where vLLM keeps
    some weights that it derives from others). The KV cache, kept the same way, is requests' state and left out."""
    return {
        f"{prefix}{'.' if prefix else ''}{name}": tensor
        for prefix, module in model.named_modules(remove_duplicate=False)
        for held in (vars(module), module._parameters, module._buffers)
        for name, tensor in held.items()
        if isinstance(tensor, torch.Tensor) and name != "kv_cache"
    }


def changes_between(
    before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor], known: Mapping[str, int]
) -> dict[str, str]:
    """Which tensors a step after loading changed, and how; `known` holds the fingerprints from before it."""
    changed = {}
    for name, tensor in after.items():
        old = before.get(name)
        if old is None:
            changed[name] = "made after loading"
        elif old is not tensor or old.shape != tensor.shape or old.data_ptr() != tensor.data_ptr():
            changed[name] = "replaced after loading"
        elif known[name] != fingerprint(tensor):
            changed[name] = "rewritten after loading"
    return changed


@contextmanager
def _unchanged(model: torch.nn.Module, live: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Prove that a block leaves every live tensor as it was. One that rebinds tensors instead of copying into them
    cannot be watched: they are put back, and EngineUnsupported raised."""
    held = {name: tensor.data for name, tensor in live.items()}
    before = _state(live)
    try:
        yield
    finally:
        after = _state(tensors_of(model))
        touched = [name for name in before if after.get(name) != before[name]]
        for name in touched:
            prefix, _, leaf = name.rpartition(".")
            live[name].data = held[name]
            setattr(model.get_submodule(prefix), leaf, live[name])
        if touched or after.keys() != before.keys():
            whole = _state(tensors_of(model)) == before
            outcome = "all is put back, and it cannot be patched in place" if whole else "restart vLLM"
            names = ", ".join((touched or sorted(after.keys() - before.keys()))[:3])
            raise EngineUnsupported(
                f"this model's loader does not copy into its weights but rebinds ({names}): {outcome}"
            )


def _state(live: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, int, tuple[int, ...], int]]:
    return {
        name: (id(tensor), tensor.data_ptr(), tuple(tensor.shape), fingerprint(tensor)) for name, tensor in live.items()
    }


def _derived(live: Mapping[str, torch.Tensor], transformed: Mapping[str, str]) -> dict[int, str]:
    """By storage, why it may not be patched: a tensor that its module (or one around it) changed or made after loading
    would be left stale."""
    return {
        tensor.untyped_storage().data_ptr(): f"{changed} was {how}"
        for changed, how in transformed.items()
        for name, tensor in live.items()
        if name.startswith(changed[: changed.rfind(".") + 1])
    }


def _without(placement: Placement, live: Mapping[str, torch.Tensor], derived: Mapping[int, str]) -> Placement:
    for name, boxes in placement.boxes.items():
        for box in boxes:
            if reason := derived.get(live[box.parameter].untyped_storage().data_ptr()):
                placement.unfit.setdefault(name, reason)
    return placement


def _carrier(width: int) -> np.dtype[np.generic]:
    return np.dtype(str(CARRIER[width]).removeprefix("torch."))
