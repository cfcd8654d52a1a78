"""Where each element of a checkpoint lives in this worker's parameters, learned by watching the model's loader once.

The loader (`load_weights`) runs over empty tensors of the checkpoint's shapes under a dispatch mode that sees every
operation. A copy from a view of a checkpoint tensor into a live parameter is one `LiveBox`: a rectangle here is a
rectangle there. That covers fused QKV and gate/up, slices, and vocabulary padding with no table of names.

Nothing is written. Every mutating operation on anything but a fresh temporary is suppressed: loaders also call `fill_`
or copy computed values. What such an operation would have overwritten does not qualify, and is named.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from deltawire.errors import EngineUnsupported
from deltawire.live.boxes import LiveBox, OtherWrite, Placement, box_of, extent_of, overwritten, shared
from deltawire.weights.boxes import Shape
from deltawire.weights.table import TensorEntry
from deltawire.weights.tensors import NAMES


def probe(
    table: Iterable[TensorEntry],
    load_weights: Callable[[Iterator[tuple[str, torch.Tensor]]], Any],
    live: Mapping[str, torch.Tensor],
) -> Placement:
    """Watch `load_weights` once. `live` names every live parameter and buffer; none of them is written.

    A tensor is unfit when a value is converted or computed on the way, or when another operation would write over it.
    Whether all of it arrives is for `Coverage` to say, because other workers may hold the rest.
    """
    watcher = _Watcher(live)
    entries = list(table)

    def observed() -> Iterator[tuple[str, torch.Tensor]]:
        for entry in entries:
            source = _source(entry)
            watcher.observe(entry.name, source)
            yield entry.name, source

    try:
        with torch.no_grad(), watcher:
            load_weights(observed())
    except Exception as error:
        raise EngineUnsupported(
            f"the model's loader refused {watcher.current} ({type(error).__name__}: {error}): "
            "is the run of the model that this server loaded?"
        ) from error
    _probe_aliases(watcher, entries, load_weights)
    placement = Placement(watcher.boxes, watcher.unfit, watcher.computed)
    for entry in entries:
        boxes = placement.boxes.get(entry.name, [])
        if not boxes and entry.name in watcher.computed:
            placement.unfit.setdefault(entry.name, watcher.computed[entry.name])
    faults = overwritten(placement.boxes, watcher.other_writes) | shared(placement.boxes)
    for name, reason in faults.items():
        placement.unfit.setdefault(name, reason)
    return placement


def _probe_aliases(
    watcher: "_Watcher",
    entries: Iterable[TensorEntry],
    load_weights: Callable[[Iterator[tuple[str, torch.Tensor]]], Any],
) -> None:
    """Find where a tensor's further names lead. In a model that ties them it is nowhere new; in one that holds two
    copies it is the second, which moves with the first. A loader that knows no such name holds it only once."""
    for entry in entries:
        for alias in entry.aliases:
            source = _source(entry)
            watcher.observe(entry.name, source)
            with suppress(Exception), torch.no_grad(), watcher:
                load_weights(iter([(alias, source)]))


def _source(entry: TensorEntry) -> torch.Tensor:
    """A tensor as a checkpoint's file gives it; on the host, whatever the default device is."""
    return torch.empty(entry.shape, dtype=getattr(torch, NAMES[entry.dtype]), device="cpu")


class _Dim(NamedTuple):
    """A dimension of a storage that holds a checkpoint tensor: its size, and its strides in both."""

    size: int
    here: int
    there: int


@dataclass(frozen=True, slots=True)
class _Trace:
    """What a storage holds: the elements of a checkpoint tensor."""

    name: str
    source_offset: int
    layout: tuple[_Dim, ...]

    def follow(self, offset: int, shape: Shape, strides: Shape) -> tuple[int, Shape] | None:
        """Source offset and strides of a view of this storage, or None when it is no rectangle of the source."""
        start, left = self.source_offset, []
        for size, here, there in self.layout:
            at, offset = divmod(offset, here)
            start += at * there
            left.append(size - at)
        followed = [0] * len(shape)
        for dim, (size, stride) in enumerate(zip(shape, strides, strict=True)):
            if size == 1:
                continue
            known = next((at for at, (_, here, _) in enumerate(self.layout) if stride and stride % here == 0), None)
            if known is None:
                return None
            _, here, there = self.layout[known]
            left[known] -= (size - 1) * (stride // here)
            followed[dim] = stride // here * there
        return None if offset or min(left, default=1) < 1 else (start, tuple(followed))


class _Watcher(TorchDispatchMode):
    """Sees every operation of a loader, lets none of them write to live memory, and notes what each would have done."""

    def __init__(self, live: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self.boxes: dict[str, list[LiveBox]] = {}
        self.unfit: dict[str, str] = {}
        self.computed: dict[str, str] = {}
        self.other_writes: list[OtherWrite] = []
        self._live = {_storage(tensor): name for name, tensor in live.items() if tensor.numel()}
        self._traces: dict[int, _Trace] = {}
        self._fresh: set[int] = set()
        self.current = ""
        self._sources: list[torch.Tensor] = []

    def observe(self, name: str, source: torch.Tensor) -> None:
        """Follow this tensor, the checkpoint's `name`, from here on."""
        self.current = name
        self._sources.append(source)  # kept alive, so that no later tensor can take its address
        if source.numel():
            layout = tuple(zip(source.shape, source.stride(), source.stride(), strict=True))
            self._traces[_storage(source)] = _Trace(name, 0, _coalesced(layout))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        targets = _mutated(func, args, kwargs)
        if targets and any(_storage(target) not in self._fresh for target in targets):
            self._note_write(func, args, targets)
            return targets[0]
        result = func(*args, **kwargs)
        for target in targets:  # a temporary that was written to holds no plain copy any more
            self._traces.pop(_storage(target), None)
        self._note_result(func, args, result)
        return result

    def _note_write(self, func: Any, args: Any, targets: list[torch.Tensor]) -> None:
        target = targets[0]
        parameter = self._live.get(_storage(target)) if target.numel() else ""
        if parameter == "":
            return
        if parameter is None:
            self.unfit[self.current] = f"its loader runs {func} on memory that is no parameter or buffer"
            return
        source = args[1] if func is torch.ops.aten.copy_.default and isinstance(args[1], torch.Tensor) else None
        trace = self._traces.get(_storage(source)) if source is not None and source.numel() else None
        box = self._box(target, parameter, source, trace) if source is not None and trace is not None else None
        if box is None or trace is None:
            first, last = extent_of(target.storage_offset(), tuple(target.shape), tuple(target.stride()))
            self.other_writes.append(OtherWrite(parameter, first, last, str(func)))
            self.computed[self.current] = f"its loader writes {parameter} by {func} from values it computed"
            return
        known = self.boxes.setdefault(trace.name, [])
        if box not in known:
            known.append(box)

    def _box(self, target: torch.Tensor, parameter: str, source: torch.Tensor, trace: _Trace) -> LiveBox | None:
        source = source.expand(target.shape)
        followed = trace.follow(source.storage_offset(), tuple(source.shape), tuple(source.stride()))
        shift = 0 if source.dtype == target.dtype else _SHIFTS.get((source.dtype, target.dtype))
        if followed is None or shift is None:
            self.unfit[trace.name] = (
                f"the server holds {target.dtype}, the run ships {source.dtype}: set the server's --dtype, or "
                "Publisher(dtype=…)"
                if followed
                else "copied as no rectangle of it"
            )
            return None
        dims = zip(target.shape, followed[1], target.stride(), strict=True)
        return box_of(dims, followed[0], parameter, target.storage_offset(), shift)

    def _note_result(self, func: Any, args: Any, result: Any) -> None:
        """Remember new storages as fresh, and which of them hold a plain copy of a checkpoint tensor."""
        inputs = {_storage(arg) for arg in args if isinstance(arg, torch.Tensor)}
        for output in result if isinstance(result, (tuple, list)) else (result,):
            if not isinstance(output, torch.Tensor) or not output.numel():
                continue
            if _storage(output) in inputs and func is not torch.ops.aten.lift_fresh.default:
                continue
            key = _storage(output)
            self._fresh.add(key)
            self._traces.pop(key, None)
            if func in _PLAIN_COPIES and (trace := self._copied(args[0], output)):
                self._traces[key] = trace

    def _copied(self, source: Any, output: torch.Tensor) -> _Trace | None:
        trace = self._traces.get(_storage(source)) if isinstance(source, torch.Tensor) else None
        if trace is None or source.dtype != output.dtype or source.shape != output.shape:
            return None
        followed = trace.follow(source.storage_offset(), tuple(source.shape), tuple(source.stride()))
        if followed is None:
            return None
        layout = tuple(zip(output.shape, output.stride(), followed[1], strict=True))
        return _Trace(trace.name, followed[0], _coalesced(layout))


_SHIFTS = {(torch.bfloat16, torch.float32): 16, (torch.float32, torch.bfloat16): -16}
"""conversions that only append zero bits, by how many, or take them off where they are zero: `Memory` refuses others"""
_PLAIN_COPIES = frozenset(
    {torch.ops.aten.clone.default, torch.ops.aten._to_copy.default, torch.ops.aten.contiguous.default}
)
"""operations whose output is new memory with the same elements in the same order (dtype and shape are checked)"""


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _coalesced(layout: Iterable[tuple[int, int, int]]) -> tuple[_Dim, ...]:
    """Dimensions by falling stride, neighbours that run on in both memories joined, single ones dropped."""
    joined: list[_Dim] = []
    for size, here, there in sorted((dim for dim in layout if dim[0] != 1), key=lambda dim: -dim[1]):
        if joined and joined[-1][1:] == (size * here, size * there):
            joined[-1] = _Dim(joined[-1].size * size, here, there)
        else:
            joined.append(_Dim(size, here, there))
    return tuple(joined)


def _mutated(func: Any, args: Any, kwargs: Any) -> list[torch.Tensor]:
    """The tensors an operation writes to, by its schema."""
    written = []
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            values = value if isinstance(value, (list, tuple)) else [value]
            written += [tensor for tensor in values if isinstance(tensor, torch.Tensor)]
    return written
