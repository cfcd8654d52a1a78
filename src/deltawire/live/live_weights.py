"""One worker's live weights seen as checkpoint tensors: read them, digest them, find where an element lives."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from typing import Any, Protocol, TypeVar

import torch

from deltawire.errors import EngineUnsupported, some
from deltawire.live.accelerator import Accelerators
from deltawire.live.boxes import LiveBox, Placement
from deltawire.live.digests import Place, digests_of, fingerprints
from deltawire.live.memory import Memory
from deltawire.live.placement import probe
from deltawire.live.post_load import Watch
from deltawire.live.transforms import AfterLoading, Transform, as_loaded, held
from deltawire.weights.bits import count
from deltawire.weights.boxes import Box
from deltawire.weights.kept import Kept, KeptParts
from deltawire.weights.table import TensorEntry

T = TypeVar("T")


class BetweenPasses(Protocol):
    """Does something where it meets no forward pass, and returns what that returned."""

    def __call__(self, errand: Callable[[], T], /) -> T: ...


def at_once(errand: Callable[[], T]) -> T:
    """`BetweenPasses` where no forward pass can happen: on the thread that runs them."""
    return errand()


class LiveWeights:
    """The run's tensors where they live in this worker: those that it holds, and of those the parts it holds.

    Opening probes the model's loader, and proves by digests that the probe wrote nothing. It refuses
    (EngineUnsupported) a model of which a tensor here can neither be patched in place nor remade. `loading` says what
    the server changed after loading. Its `transforms` are followed or repeated; what else changed makes its module
    unfit.

    What its tensors are on is in `accelerators`, or the host. Digesting takes seconds for a large model there, and
    disturbs no forward pass. Probing does, and takes moments: it is done by `between_passes`.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        table: Iterable[TensorEntry],
        *,
        loading: AfterLoading,
        load_weights: Callable[[Iterator[tuple[str, torch.Tensor]]], object] | None = None,
        between_passes: BetweenPasses = at_once,
        accelerators: Accelerators | None = None,
    ) -> None:
        self.accelerators = accelerators or Accelerators()
        self.table = {entry.name: entry for entry in table}

        def see() -> dict[str, torch.Tensor]:
            with as_loaded(loading.transforms):
                return tensors_of(model)

        def watch() -> Placement:
            with as_loaded(loading.transforms), _bound(model, loaded):
                return probe(self.table.values(), load_weights or model.load_weights, loaded)

        loaded = between_passes(see)
        self.accelerators.take_for(loaded.values())
        with _unchanged(loaded, self.accelerators):
            placement = between_passes(watch)
        self.transforms: dict[str, list[Transform]] = {}
        self._memory: dict[tuple[str, int], Memory] = {}
        self.placement = _without(placement, loaded, _derived(tensors_of(model) | loaded, loading.unexplained))
        transforms = {
            _address(old): (transform, leaf)
            for transform in loading.transforms
            for leaf, old in transform.loaded.items()
        }
        for name, boxes in placement.boxes.items():
            placement.boxes[name] = [part for box in boxes for part in self._settle(name, box, loaded, transforms)]
        placement.require(self.table)
        if stale := [transform.prefix for transform in self.remade() if not transform.is_current()]:
            raise EngineUnsupported(f"what the server makes of {stale[0]} after loading is not the same every time")

    @property
    def sizes(self) -> dict[str, int]:
        """Elements of each checkpoint tensor, wherever they are."""
        return {name: count(entry.shape) for name, entry in self.table.items()}

    @property
    def absent(self) -> list[str]:
        """The frozen tensors of which nothing is here: the server derives them, or never loads them."""
        return [
            name for name, entry in self.table.items() if not entry.trainable and not self.placement.boxes.get(name)
        ]

    @property
    def parts(self) -> dict[str, list[Box]]:
        """Which rectangles of each checkpoint tensor are here."""
        return self.placement.parts

    @cached_property
    def kept(self) -> KeptParts | None:
        """What of each tensor is here; None where that is all tensors of the run that it trains, each whole."""
        held = {name: Kept(self.table[name].shape, parts) for name, parts in self.parts.items() if parts}
        trained = [name for name, entry in self.table.items() if entry.trainable]
        return None if all(name in held and held[name].is_whole for name in trained) else held

    def places(self, name: str) -> Iterator[Place]:
        """Where the parts of a tensor live."""
        for box in self.placement.boxes.get(name, []):
            yield Place(self._memory[box.parameter, box.shift], box)

    def digests(self, names: Iterable[str] | None = None) -> dict[str, tuple[int, ...]]:
        """The digest of every part of these tensors, by default of all, from live memory: the full audit."""
        places = {name: list(self.places(name)) for name in (self.table if names is None else names)}
        totals = iter(digests_of([place for own in places.values() for place in own]))
        return {name: tuple(itertools.islice(totals, len(own))) for name, own in places.items()}

    def remade(self) -> list[Transform]:
        """The transforms that are repeated when what they work on changes."""
        return list(
            {id(transform): transform for transforms in self.transforms.values() for transform in transforms}.values()
        )

    def _settle(
        self,
        name: str,
        box: LiveBox,
        loaded: Mapping[str, torch.Tensor],
        transforms: Mapping[int, tuple[Transform, str]],
    ) -> list[LiveBox]:
        """A box of the weights as the loader sees them, as boxes of where they are."""
        memory, boxes = loaded[box.parameter], [box]
        transform, leaf = transforms.get(_address(memory), (None, ""))
        if transform is not None and transform.layouts:
            live = transform.module._parameters[leaf]
            carried = transform.layouts[leaf].carry(box)
            if live is None or carried is None:
                self.placement.unfit[name] = f"{transform.parameter(leaf)} is packed across it after loading"
                return []
            start = live.storage_offset()
            memory, boxes = live, [replace(part, target_offset=part.target_offset + start) for part in carried]
        elif transform is not None and transform not in self.transforms.setdefault(name, []):
            self.transforms[name].append(transform)
        self._memory.setdefault(
            (box.parameter, box.shift), Memory(memory, box.shift, self.accelerators.of(memory.device))
        )
        return boxes


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
    """Which tensors were changed after loading, and how; `known` holds the fingerprints from before. A name that
    was tied to another tensor of before is no change: it is one more name of that one."""
    changed: dict[str, str] = {}
    same: dict[str, torch.Tensor] = {}
    tensors = {id(tensor) for tensor in before.values()}
    for name, tensor in after.items():
        old = before.get(name)
        if old is not tensor and id(tensor) in tensors:
            continue
        if old is None:
            changed[name] = "made after loading"
        elif old is not tensor or old.shape != tensor.shape or old.data_ptr() != tensor.data_ptr():
            changed[name] = "replaced after loading"
        else:
            same[name] = tensor
    for name, value in fingerprints(same, Accelerators(0)).items():
        if known[name] != value:
            changed[name] = "rewritten after loading"
    return changed


def watch_loading(model: torch.nn.Module, process: Callable[[], Any]) -> tuple[Any, AfterLoading]:
    """Run what a server does to a model after loading it. Each module's own transform is watched by itself; what else
    changed is not explained."""
    before = tensors_of(model)
    known = fingerprints(before, Accelerators(0))
    watch = Watch(model)
    with watch.modules():
        result = process()
    changes = changes_between(before, tensors_of(model), known)
    explained = {id(transform.module) for transform in watch.transforms}
    for prefix, module in model.named_modules(remove_duplicate=False):
        if id(module) in explained:  # under whichever of its names
            for leaf in held(module):
                changes.pop(f"{prefix}.{leaf}" if prefix else leaf, None)
    return result, AfterLoading(changes, watch.transforms)


@contextmanager
def _unchanged(live: Mapping[str, torch.Tensor], accelerators: Accelerators) -> Iterator[None]:
    """Prove by digests that a block leaves the bits of every live tensor as they were, or raise EngineUnsupported."""
    before = fingerprints(live, accelerators)
    try:
        yield
    finally:
        after = fingerprints(live, accelerators)
        if touched := [name for name in live if after[name] != before[name]]:
            raise EngineUnsupported(f"this model's loader wrote to its weights ({some(touched)}): restart the server")


@contextmanager
def _bound(model: torch.nn.Module, live: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Prove that a block leaves every name bound to its tensor and every tensor to its memory. A loader that rebinds
    tensors instead of copying into them cannot be watched: they are put back, and EngineUnsupported raised."""
    held = {name: tensor.data for name, tensor in live.items()}
    before = _bindings(live)
    try:
        yield
    finally:
        after = _bindings(tensors_of(model))
        touched = [name for name in before if after.get(name) != before[name]]
        for name in touched:
            prefix, _, leaf = name.rpartition(".")
            live[name].data = held[name]
            setattr(model.get_submodule(prefix), leaf, live[name])
        if touched or after.keys() != before.keys():
            whole = _bindings(tensors_of(model)) == before
            outcome = "all is put back, and it cannot be patched in place" if whole else "restart the server"
            names = some(touched or sorted(after.keys() - before.keys()))
            raise EngineUnsupported(
                f"this model's loader does not copy into its weights but rebinds ({names}): {outcome}"
            )


def _bindings(live: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, int, tuple[int, ...]]]:
    return {name: (id(tensor), tensor.data_ptr(), tuple(tensor.shape)) for name, tensor in live.items()}


def _derived(live: Mapping[str, torch.Tensor], transformed: Mapping[str, str]) -> dict[int, str]:
    """By storage, why it may not be patched: a tensor that its module (or one around it) changed or made after loading
    would be left stale."""
    return {
        _address(tensor): f"{changed} was {how}"
        for changed, how in transformed.items()
        for name, tensor in live.items()
        if name.startswith(changed[: changed.rfind(".") + 1])
    }


def _without(placement: Placement, live: Mapping[str, torch.Tensor], derived: Mapping[int, str]) -> Placement:
    for name, boxes in placement.boxes.items():
        for box in boxes:
            if reason := derived.get(_address(live[box.parameter])):
                placement.unfit.setdefault(name, reason)
    return placement


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
