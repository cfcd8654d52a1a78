"""What a server does to a module's weights after loading them, done again: pack, pad, quantise, hand them to a kernel.

A transform that only moves elements about has layouts, and its weights are patched where they lie. A module with any
other transform also keeps its weights as they were loaded. An update changes those and runs the transform again on a
shadow of the module; its result goes into the live one.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from deltawire.errors import EngineUnsupported
from deltawire.live.layouts import Layout
from deltawire.live.memory import same_bits

PROBE_ROWS = 3
"""rows of the input by which two modules that keep their weights out of sight are compared"""
_PLAIN = (bool, int, float, str, type(None), torch.dtype)


@dataclass(eq=False)
class Transform:
    """A module's weights as the loader sees them (`loaded`), and the transform that made the live ones of them.

    With `layouts` the transform only moves elements: `loaded` are placeholders of the right shapes. The weights live in
    the module then, each rearranged by its layout. Without, `loaded` holds the weights, of which the live module is
    made.

    `before` is the module's state from before the transform, of which every tensor is a copy. The transform left
    functions that may hold weights in the attributes `hidden`. It set the attributes `plain` to numbers, flags or
    names.
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
        """A module that is to these loaded values what the live one is to its own. It owns them: the transform may
        write its result there, as vLLM's `replace_parameter` does since 0.33. Raises EngineUnsupported when the
        transform fails."""
        shadow = _revive(self.before, type(self.module))
        shadow._parameters = {leaf: parameter_like(old, values[leaf]) for leaf, old in self.loaded.items()}
        try:
            with torch.no_grad():
                shadow.quant_method.process_weights_after_loading(shadow)
        except Exception as error:
            raise EngineUnsupported(
                f"what the server does to {self.prefix} after loading cannot be done again "
                f"({type(error).__name__}: {error})"
            ) from error
        return shadow

    def results(self, module: nn.Module) -> dict[str, torch.Tensor]:
        """The tensors of a module that its transform made."""
        made = held(module)
        if module is self.module:
            kept = {tensor.data_ptr() for tensor in self.loaded.values()}
            return {name: tensor for name, tensor in made.items() if tensor.data_ptr() not in kept}
        return {name: made[name] for name in self.results(self.module) if name in made}

    def is_current(self) -> bool:
        """Whether the live module is what its loaded values make, bit for bit. Of what it keeps out of sight, the same
        input must give the same output."""
        shadow = self.shadow(self.copies())
        if not self.is_plainly(shadow):
            return False
        mine, right = self.results(self.module), self.results(shadow)
        if mine.keys() != right.keys() or not all(same_bits(mine[name], right[name]) for name in mine):
            return False
        return not self.hidden or torch.equal(self._answer(self.module), self._answer(shadow))

    def is_plainly(self, shadow: nn.Module) -> bool:
        """Whether the transform set the same numbers, flags and names on a shadow as on the live module."""
        mine, right = plain_attributes(self.module), plain_attributes(shadow)
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
    """What a server changed of a loaded model: `transforms` that are understood, and by name what is not."""

    unexplained: dict[str, str] = field(default_factory=dict)
    transforms: list[Transform] = field(default_factory=list)


@contextmanager
def as_loaded(transforms: list[Transform]) -> Iterator[None]:
    """Give the modules, for a while, the parameters that the loader knows; nothing runs meanwhile."""
    live = [(transform.module, transform.module._parameters) for transform in transforms]
    try:
        for transform in transforms:
            transform.module._parameters = dict(transform.loaded)
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


def state_before(module: nn.Module, method: object) -> dict[str, Any]:
    """A module's state but for its parameters, to make shadows of."""
    state = {name: _owned(value) for name, value in vars(module).items() if name != "_parameters"}
    state["quant_method"] = copied(method)
    if "quant_method" in state["_modules"]:  # held as a submodule
        state["_modules"]["quant_method"] = state["quant_method"]
    return state


def _revive(before: Mapping[str, Any], kind: type[nn.Module]) -> nn.Module:
    shadow = object.__new__(kind)
    shadow.__dict__.update({name: _owned(value) for name, value in before.items()})
    shadow.__dict__["quant_method"] = copied(before["quant_method"])
    return shadow


def copied(method: object) -> object:
    """An object like this one, over tensors of its own."""
    copied = copy.copy(method)
    for name, value in getattr(method, "__dict__", {}).items():
        copied.__dict__[name] = _owned(value)
    return copied


def _owned(value: Any) -> Any:
    """A value, and the tensors in it copied: a transform may write into what it finds."""
    if isinstance(value, nn.Parameter):
        return parameter_like(value, value.detach().clone())
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if type(value) is set:
        return set(value)
    if type(value) in (dict, list, tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        owned = {key: _owned(item) for key, item in items}
        return owned if isinstance(value, dict) else type(value)(owned.values())
    return value


def plain_attributes(module: nn.Module) -> dict[str, Any]:
    """The numbers, flags and names among a module's attributes."""
    return {name: value for name, value in vars(module).items() if isinstance(value, _PLAIN)}


def parameter_like(old: torch.Tensor, data: torch.Tensor) -> nn.Parameter:
    """A parameter of the same class, with the same loader and other attributes, over other memory."""
    new = torch.Tensor._make_subclass(type(old), data.detach(), False)
    new.__dict__.update(vars(old))
    return new
