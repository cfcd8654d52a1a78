"""What vLLM does to a module's weights after loading them: pack, pad, quantise, hand them to a kernel.

Each module's step is watched once, while the model loads. One that only moves elements about is learned, by sending
numbered values through it, and its weights are patched where they lie. Of any other the weights are kept as they were
loaded: an update changes those, and runs the step again on a shadow of the module whose result goes into the live one.
"""

import copy
import functools
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from deltawire.errors import EngineUnsupported
from deltawire.live.layouts import Layout, fit
from deltawire.live.memory import CARRIER, same_bits, to_host

PROBE_ROWS = 3
"""rows of the input by which two modules that keep their weights out of sight are compared"""


@dataclass(eq=False)
class Step:
    """A module's weights as the loader sees them (`loaded`), and the step that made the live ones of them.

    With `layouts` the step only moves elements: `loaded` are placeholders of the right shapes, and the weights live in
    the module, each rearranged by its layout. Without, `loaded` holds the weights and the live module is made of them.

    `before` is the module's state from before the step, of which every tensor is a copy. The step left functions that
    may hold weights in the attributes `hidden`, and set the attributes `plain` to numbers, flags or names.
    """

    prefix: str
    module: nn.Module
    loaded: dict[str, nn.Parameter]
    before: dict[str, Any]
    hidden: tuple[str, ...] = ()
    plain: tuple[str, ...] = ()
    layouts: dict[str, Layout] = field(default_factory=dict)

    def parameter(self, leaf: str) -> str:
        """A parameter's name in the model."""
        return f"{self.prefix}.{leaf}" if self.prefix else leaf

    def copies(self) -> dict[str, torch.Tensor]:
        """The loaded values, for a shadow to own."""
        return {leaf: old.detach().clone() for leaf, old in self.loaded.items()}

    def shadow(self, values: Mapping[str, torch.Tensor]) -> nn.Module:
        """A module that is to these loaded values what the live one is to its own. It owns them: the step may write its
        result there, as vLLM's `replace_parameter` does since 0.33. Raises EngineUnsupported when the step fails."""
        shadow = _revive(self.before, type(self.module))
        shadow._parameters = {leaf: _parameter_like(old, values[leaf]) for leaf, old in self.loaded.items()}
        try:
            with torch.no_grad():
                shadow.quant_method.process_weights_after_loading(shadow)
        except Exception as error:
            raise EngineUnsupported(
                f"what vLLM does to {self.prefix} after loading cannot be done again ({type(error).__name__}: {error})"
            ) from error
        return shadow

    def results(self, module: nn.Module) -> dict[str, torch.Tensor]:
        """The tensors of a module that its step made."""
        made = held(module)
        if module is self.module:
            kept = {tensor.data_ptr() for tensor in self.loaded.values()}
            return {name: tensor for name, tensor in made.items() if tensor.data_ptr() not in kept}
        return {name: made[name] for name in self.results(self.module) if name in made}

    def is_current(self) -> bool:
        """Whether the live module is what its loaded values make, bit for bit (what it keeps out of sight: as far as
        the same input gives the same output)."""
        shadow = self.shadow(self.copies())
        if not self.is_plainly(shadow):
            return False
        mine, right = self.results(self.module), self.results(shadow)
        if mine.keys() != right.keys() or not all(same_bits(mine[name], right[name]) for name in mine):
            return False
        return not self.hidden or torch.equal(self._answer(self.module), self._answer(shadow))

    def is_plainly(self, shadow: nn.Module) -> bool:
        """Whether the step set the same numbers, flags and names on a shadow as on the live module."""
        mine, right = _plain(self.module), _plain(shadow)
        return all(repr(mine.get(name)) == repr(right.get(name)) for name in self.plain)

    def _answer(self, module: nn.Module) -> torch.Tensor:
        weight = next((tensor for tensor in self.loaded.values() if tensor.dim() == 2), None)
        if weight is None:
            raise EngineUnsupported(f"{self.prefix} keeps weights out of sight and has no matrix to try them with")
        ramp = torch.arange(PROBE_ROWS * weight.shape[1], dtype=torch.float32, device=weight.device)
        values = torch.sin(ramp).reshape(PROBE_ROWS, -1).to(weight.dtype)
        with torch.inference_mode():
            answer: torch.Tensor = module.quant_method.apply(module, values)
        return answer


@dataclass(eq=False)
class AfterLoading:
    """What vLLM changed of a loaded model: `steps` that are understood, and by name what is not."""

    unexplained: dict[str, str] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)


class Watch:
    """Collects a Step for each module whose weights its post-load step changed; `run` takes the step's place."""

    def __init__(self, model: nn.Module) -> None:
        self.steps: list[Step] = []
        self._modules = dict(model.named_modules())
        self._prefixes = {id(module): name for name, module in self._modules.items()}
        self._known: dict[object, dict[str, Layout]] = {}

    @contextmanager
    def modules(self) -> Iterator[None]:
        """Watch every module's step for a while."""
        methods: dict[int, Any] = {}
        for module in self._modules.values():
            method = getattr(module, "quant_method", None)
            if callable(getattr(method, "process_weights_after_loading", None)):
                methods[id(method)] = method
        for method in methods.values():
            step, pristine = method.process_weights_after_loading, _copied(method)
            run = functools.partial(self.run, step=step, method=pristine)
            object.__setattr__(method, "process_weights_after_loading", run)
        try:
            yield
        finally:
            for method in methods.values():
                del method.__dict__["process_weights_after_loading"]

    def run(self, module: nn.Module, step: Callable[[nn.Module], Any], method: object) -> Any:
        """Do the step, and learn what it did to `module`. `method` is a copy of what does it, from before."""
        before = _frozen(module, method)
        tensors, callables = held(module), _closures(module)
        copies = {leaf: tensor.detach().clone() for leaf, tensor in tensors.items()}
        parameters = {
            leaf: _parameter_like(old, copies[leaf]) for leaf, old in module._parameters.items() if old is not None
        }  # as they are now: since vLLM 0.33 a step changes the objects themselves
        plain = _plain(module)
        result = step(module)
        hidden = tuple(name for name, made in _closures(module).items() if callables.get(name) is not made)
        now = held(module)
        changed = {leaf for leaf in now if leaf not in tensors or not _kept(tensors[leaf], copies[leaf], now[leaf])} | (
            tensors.keys() - now.keys()
        )
        if parameters and (changed or hidden):
            loaded = {
                leaf: old if leaf in changed else _parameter_like(old, now[leaf].data)
                for leaf, old in parameters.items()
            }
            made = tuple(name for name, value in _plain(module).items() if repr(value) != repr(plain.get(name, ...)))
            found = Step(self._prefixes.get(id(module), ""), module, loaded, before, hidden, made)
            if not hidden:
                found.layouts = self._layouts(found, copies)
            if found.layouts:
                found.loaded = {leaf: _parameter_like(old, torch.empty_like(old)) for leaf, old in loaded.items()}
            self.steps.append(found)
        return result

    def _layouts(self, step: Step, values: Mapping[str, torch.Tensor]) -> dict[str, Layout]:
        """The layouts that lead from the loaded values to the live module; none when they do not explain it."""
        shapes = tuple((leaf, old.dtype, tuple(old.shape)) for leaf, old in step.loaded.items())
        kind = type(step.module), type(step.before["quant_method"]), shapes
        if kind not in self._known:
            try:
                self._known[kind] = learn(step)
            except EngineUnsupported:  # told again, and to somebody, when a bucket is attached
                self._known[kind] = {}
        layouts = self._known[kind]
        live = step.module._parameters
        right = all(_explains(layout, values[leaf], live.get(leaf)) for leaf, layout in layouts.items())
        return layouts if right else {}


def learn(step: Step) -> dict[str, Layout]:
    """Send numbers through a step: element `i` of all loaded values together carries `i + 1`, as many bits at a time as
    the narrowest dtype has. Empty when elements are computed, lost or copied twice on the way."""
    sizes = {leaf: old.numel() for leaf, old in step.loaded.items()}
    width = 8 * min(old.element_size() for old in step.loaded.values())
    total = sum(sizes.values())
    seen: dict[str, np.ndarray] = {}
    for shift in range(0, total.bit_length(), width):
        start, values = 1, {}
        for leaf, old in step.loaded.items():
            numbers = torch.arange(start, start + sizes[leaf]) >> shift & ((1 << width) - 1)
            carrier = numbers.to(CARRIER[old.element_size()]).reshape(old.shape)
            values[leaf] = carrier.view(old.dtype).to(old.device)
            start += sizes[leaf]
        made = step.shadow(values)
        if not step.is_plainly(made):  # a number that is computed from the weights
            return {}
        for leaf, tensor in held(made).items():
            if leaf in made._parameters or leaf not in step.before:
                flat = tensor.detach().contiguous().reshape(-1).view(CARRIER[tensor.element_size()])
                part = flat.cpu().numpy().astype(np.int64) & ((1 << width) - 1)
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


@contextmanager
def as_loaded(steps: list[Step]) -> Iterator[None]:
    """Give the modules, for a while, the parameters that the loader knows; nothing runs meanwhile."""
    live = [(step.module, step.module._parameters) for step in steps]
    try:
        for step in steps:
            step.module._parameters = dict(step.loaded)
        yield
    finally:
        for module, parameters in live:
            module._parameters = parameters


def held(module: nn.Module) -> dict[str, torch.Tensor]:
    """Every tensor that a module itself holds: attributes, parameters, buffers."""
    return {
        name: tensor
        for where in (vars(module), module._parameters, module._buffers)
        for name, tensor in where.items()
        if isinstance(tensor, torch.Tensor)
    }


def _frozen(module: nn.Module, method: object) -> dict[str, Any]:
    """A module's state but for its parameters, to make shadows of."""
    state = {name: _owned(value) for name, value in vars(module).items() if name != "_parameters"}
    state["quant_method"] = _copied(method)
    if "quant_method" in state["_modules"]:  # held as a submodule
        state["_modules"]["quant_method"] = state["quant_method"]
    return state


def _revive(before: Mapping[str, Any], kind: type[nn.Module]) -> nn.Module:
    shadow = object.__new__(kind)
    shadow.__dict__.update({name: _owned(value) for name, value in before.items()})
    shadow.__dict__["quant_method"] = _copied(before["quant_method"])
    return shadow


def _copied(method: object) -> object:
    """An object like this one, over tensors of its own."""
    copied = copy.copy(method)
    for name, value in getattr(method, "__dict__", {}).items():
        copied.__dict__[name] = _owned(value)
    return copied


def _owned(value: Any) -> Any:
    """A value, and the tensors in it copied: a step may write into what it finds."""
    if isinstance(value, nn.Parameter):
        return _parameter_like(value, value.detach().clone())
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if type(value) is set:
        return set(value)
    if type(value) in (dict, list, tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        owned = {key: _owned(item) for key, item in items}
        return owned if isinstance(value, dict) else type(value)(owned.values())
    return value


def _plain(module: nn.Module) -> dict[str, Any]:
    """The numbers, flags and names among a module's attributes."""
    return {name: value for name, value in vars(module).items() if isinstance(value, _PLAIN)}


def _parameter_like(old: torch.Tensor, data: torch.Tensor) -> nn.Parameter:
    """A parameter of the same class, with the same loader and other attributes, over other memory."""
    new = torch.Tensor._make_subclass(type(old), data.detach(), False)
    new.__dict__.update(vars(old))
    return new


def _kept(old: torch.Tensor, copied: torch.Tensor, now: torch.Tensor | None) -> bool:
    return now is old and now.shape == copied.shape and same_bits(now, copied)


def _explains(layout: Layout, loaded: torch.Tensor, live: torch.Tensor | None) -> bool:
    """Whether a live tensor holds these values in this order."""
    if live is None or live.dtype != loaded.dtype or not live.is_contiguous():
        return False
    flat = to_host(live)
    sizes = [size for size, _, _ in layout.digits]
    strides = [flat.itemsize * after for _, _, after in layout.digits]
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


_PLAIN = (bool, int, float, str, type(None), torch.dtype)
_HARMLESS = (int, float, str, type(None), type, types.FunctionType, types.ModuleType, torch.dtype)
