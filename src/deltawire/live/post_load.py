"""Learns, while a model loads, what its server does to each module's weights after loading them.

Each module's transform is watched once. One that only moves elements about is learned, by sending numbered values
through it; of any other the loaded weights are kept.
"""

import functools
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from deltawire.errors import EngineUnsupported
from deltawire.live.layouts import Layout, fit
from deltawire.live.memory import carrier_of, same_bits, to_host
from deltawire.live.transforms import Transform, copied, held, parameter_like, plain_attributes, state_before
from deltawire.weights.device.carriers import CARRIERS

_HARMLESS = (int, float, str, type(None), type, types.FunctionType, types.ModuleType, torch.dtype)


class Watch:
    """Collects a Transform for each module whose weights were changed after loading; `run` takes its place."""

    def __init__(self, model: nn.Module) -> None:
        self.transforms: list[Transform] = []
        self._modules = dict(model.named_modules())
        self._prefixes = {id(module): name for name, module in self._modules.items()}
        self._known: dict[object, dict[str, Layout]] = {}

    @contextmanager
    def modules(self) -> Iterator[None]:
        """Watch every module's transform for a while."""
        methods: dict[int, Any] = {}
        for module in self._modules.values():
            method = getattr(module, "quant_method", None)
            if callable(getattr(method, "process_weights_after_loading", None)):
                methods[id(method)] = method
        for method in methods.values():
            transform, pristine = method.process_weights_after_loading, copied(method)
            run = functools.partial(self.run, transform=transform, method=pristine)
            object.__setattr__(method, "process_weights_after_loading", run)
        try:
            yield
        finally:
            for method in methods.values():
                del method.__dict__["process_weights_after_loading"]

    def run(self, module: nn.Module, transform: Callable[[nn.Module], Any], method: object) -> Any:
        """Do the transform, and learn what it did to `module`. `method` is a copy of what does it, from before."""
        before = state_before(module, method)
        tensors, callables = held(module), _closures(module)
        copies = {leaf: tensor.detach().clone() for leaf, tensor in tensors.items()}
        parameters = {
            leaf: parameter_like(old, copies[leaf]) for leaf, old in module._parameters.items() if old is not None
        }  # as they are now: since vLLM 0.33 a transform changes the objects themselves
        plain = plain_attributes(module)
        result = transform(module)
        hidden = tuple(name for name, made in _closures(module).items() if callables.get(name) is not made)
        now = held(module)
        kept = {leaf for leaf in now if leaf in tensors and _kept(tensors[leaf], copies[leaf], now[leaf])}
        changed = (tensors.keys() | now.keys()) - kept
        if parameters and (changed or hidden):
            loaded = {
                leaf: old if leaf in changed else parameter_like(old, now[leaf].data)
                for leaf, old in parameters.items()
            }
            made = tuple(
                name for name, value in plain_attributes(module).items() if repr(value) != repr(plain.get(name, ...))
            )
            found = Transform(self._prefixes.get(id(module), ""), module, loaded, before, hidden, made)
            if not hidden:
                found.layouts = self._layouts(found, copies)
            if found.layouts:
                found.loaded = {leaf: parameter_like(old, torch.empty_like(old)) for leaf, old in loaded.items()}
            self.transforms.append(found)
        return result

    def _layouts(self, transform: Transform, values: Mapping[str, torch.Tensor]) -> dict[str, Layout]:
        """The layouts that lead from the loaded values to the live module; none when they do not explain it."""
        shapes = tuple((leaf, old.dtype, tuple(old.shape)) for leaf, old in transform.loaded.items())
        kind = type(transform.module), type(transform.before["quant_method"]), shapes
        if kind not in self._known:
            try:
                self._known[kind] = learn(transform)
            except EngineUnsupported:  # raised again when a bucket is attached, to be read
                self._known[kind] = {}
        layouts = self._known[kind]
        live = transform.module._parameters
        right = all(_explains(layout, values[leaf], live.get(leaf)) for leaf, layout in layouts.items())
        return layouts if right else {}


def learn(transform: Transform) -> dict[str, Layout]:
    """The layouts of a transform, learned by sending numbers through it. Empty when elements are computed, lost or
    copied twice on the way.

    Element `i` of all loaded values together carries `i + 1`, as many bits at a time as the narrowest dtype has.
    """
    sizes = {leaf: old.numel() for leaf, old in transform.loaded.items()}
    width = 8 * min(old.element_size() for old in transform.loaded.values())
    total = sum(sizes.values())
    seen: dict[str, np.ndarray] = {}
    for shift in range(0, total.bit_length(), width):
        start, values = 1, {}
        for leaf, old in transform.loaded.items():
            numbers = torch.arange(start, start + sizes[leaf]) >> shift & ((1 << width) - 1)
            carrier = numbers.to(CARRIERS[old.element_size()]).reshape(old.shape)
            values[leaf] = carrier.view(old.dtype).to(old.device)
            start += sizes[leaf]
        made = transform.shadow(values)
        if not transform.is_plainly(made):  # a number that is computed from the weights
            return {}
        for leaf, tensor in held(made).items():
            if leaf in made._parameters or leaf not in transform.before:
                part = carrier_of(tensor).cpu().numpy().astype(np.int64) & ((1 << width) - 1)
                seen[leaf] = seen.get(leaf, np.zeros(part.size, np.int64)) | part << shift
    return _layouts_of(sizes, seen)


def _layouts_of(sizes: Mapping[str, int], seen: Mapping[str, np.ndarray]) -> dict[str, Layout]:
    layouts, start = {}, 1
    if seen.keys() != sizes.keys():
        return {}
    for leaf, size in sizes.items():
        numbers = seen[leaf] - start
        places = np.flatnonzero(seen[leaf])
        sources = numbers[places]
        if places.size != size or sources.min() < 0 or sources.max() >= size:
            return {}
        targets = np.full(size, -1, np.int64)
        targets[sources] = places
        layout = fit(targets) if (targets >= 0).all() else None
        if layout is None:
            return {}
        layouts[leaf] = layout
        start += size
    return layouts


def _kept(old: torch.Tensor, copied: torch.Tensor, now: torch.Tensor | None) -> bool:
    return now is old and now.shape == copied.shape and same_bits(now, copied)


def _explains(layout: Layout, loaded: torch.Tensor, live: torch.Tensor | None) -> bool:
    """Whether a live tensor holds these values in this order."""
    if live is None or live.dtype != loaded.dtype or not live.is_contiguous():
        return False
    flat = to_host(live)
    sizes = [digit.size for digit in layout.digits]
    strides = [flat.itemsize * digit.after for digit in layout.digits]
    moved = np.lib.stride_tricks.as_strided(flat[layout.start :], sizes, strides, writeable=False)
    return np.array_equal(moved.reshape(-1), to_host(loaded))


def _closures(module: nn.Module) -> dict[str, Any]:
    """Functions a module holds that keep an object of their own, where a copy of a weight can hide."""
    return {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, types.FunctionType)
        and any(not isinstance(cell.cell_contents, _HARMLESS) for cell in value.__closure__ or ())
    }
