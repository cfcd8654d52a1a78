"""Which names are one tensor: by memory where tensors are at hand, by config and bits where only a file is.

A file says nothing of storages, and equal bits alone tie nothing: two norms of ones are two tensors. So two names of a
checkpoint are one tensor under two conditions. The config, or transformers' own table for the model type, ties them.
And their bits are equal. transformers and vLLM load a checkpoint by the same rule.
"""

import json
import sys
import weakref
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltawire.prepare.names import ShardedView, place_of
from deltawire.weights.bits import Bits
from deltawire.weights.tensors import is_sharded, is_torch

CONFIG = "config.json"
WORDS = "tie_word_embeddings"
HEAD = "lm_head.weight"
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
"""how the names of input embeddings end in the checkpoints of causal language models"""
Ties = dict[str, str]
"""canonical name by alias"""


def ties_words(folder: Path | None) -> bool | None:
    """Whether a checkpoint's config says that the head is the input embedding.

    None where it does not say, or says both of different parts of the model.
    """
    config = _config(folder)
    parts = [part.get(WORDS) for part in (config, config.get("text_config")) if isinstance(part, dict)]
    said = {part for part in parts if isinstance(part, bool)}
    return said.pop() if len(said) == 1 else None


def head_of(names: Iterable[str]) -> Ties:
    """The head and the input embedding that `tie_word_embeddings` speaks of; nothing unless there is one of each."""
    names = list(names)
    heads = [name for name in names if _ends(name, HEAD)]
    embeddings = [name for name in names if any(_ends(name, end) for end in EMBEDDINGS)]
    return {heads[0]: embeddings[0]} if len(heads) == len(embeddings) == 1 else {}


def in_file(folder: Path, weights: Mapping[str, Bits], digests: Mapping[str, int]) -> Ties:
    """The aliases in a checkpoint's files: names whose bits are equal and that its config ties.

    Where the config is silent, transformers says what is tied, if this process has imported it. `digests` are those of
    `weights`.
    """
    twins: dict[tuple[str, tuple[int, ...], int], list[str]] = {}
    for name, bits in weights.items():
        if bits.data.size and len(bits.shape) > 1:
            twins.setdefault((bits.dtype, bits.shape, digests[name]), []).append(name)
    equal = {name: number for number, names in enumerate(twins.values()) if len(names) > 1 for name in names}
    if not equal:
        return {}
    said = ties_words(folder)
    declared: Ties = {} if said is False else (head_of(weights) if said else {}) or _transformers_ties(folder)
    found = {alias: name for alias, name in declared.items() if alias in equal and equal[alias] == equal.get(name)}
    return {alias: name for alias, name in found.items() if weights[alias] == weights[name]}


class Given:
    """The tensors of one publish, and which of their names are the same memory. Only torch tensors are looked at.

    No tensor is kept alive. Once one is gone nothing is known of it, for its memory is used again. A buffer that was
    filled again is another tensor, too: torch counts the writes to it.
    """

    def __init__(self) -> None:
        self.twins: Ties = {}
        """by name, the first name under which the same memory was given"""
        self._first_names: dict[Any, str] = {}
        self._owners: dict[str, weakref.ref[Any]] = {}

    def note(self, name: str, tensor: Any) -> str | None:
        """Remember a tensor; the name under which its memory was given before."""
        owner = tensor.tensor if isinstance(tensor, ShardedView) else tensor
        if not is_torch(owner) or owner.is_inference() or not owner.numel():
            return None
        held = owner.detach().to_local() if is_sharded(owner) else owner
        try:
            key = *place_of(tensor), held._version
        except RuntimeError:  # a tensor that wraps others, as of float8 training, has no storage of its own
            return None
        first = self._first_names.get(key)
        if first is not None and self._owners[first]() is not None:
            self.twins[name] = first
            return first
        self._first_names[key] = name
        self._owners[name] = weakref.ref(owner)
        return None

    def are_one(self, one: str, other: str) -> bool:
        """Whether two names were given in the same memory."""
        return self.twins.get(one, one) == self.twins.get(other, other)

    def are_two(self, one: str, other: str) -> bool:
        """Whether two names are known to be different memory: both tensors are still there, and are not the same."""
        owners = [self._owners.get(self.twins.get(name, name)) for name in (one, other)]
        return all(owner is not None and owner() is not None for owner in owners) and not self.are_one(one, other)


@dataclass(frozen=True, slots=True, eq=False)
class GivenTensor:
    """One tensor of a publish: the name that the run knows it by, the name it was given under, and itself."""

    name: str
    alias: str
    tensor: Any


def resolved(
    pairs: Iterable[tuple[str, Any]], aliases: Ties, held: Container[str] | None, given: Given | None
) -> Iterator[GivenTensor]:
    """The tensors of these pairs, each under the name that a run knows it by.

    A name that is not among those `held` is one more of the tensor in whose memory it is. While a run begins the
    tensors are noted in `given`.
    """
    for alias, tensor in pairs:
        name, twin = aliases.get(alias, alias), given.note(alias, tensor) if given is not None else None
        is_second = twin is not None and held is not None and name not in held
        yield GivenTensor(aliases.get(twin, twin) if twin is not None and is_second else name, alias, tensor)


def settle(
    declared: Ties, given: Given, named: Iterable[str], fixed: Iterable[str], equal: Callable[[str, str], bool]
) -> Ties:
    """The aliases of a run that begins, from its first publish.

    `declared` are those that a config ties, and `named` was given. `fixed` are the names in the base's files: one that
    is not an alias there stays a tensor of its own. Two names in different memory are two tensors, whatever a config
    says. Where memory cannot show it, declared names are one tensor. Names whose bits are not `equal` never are.
    """
    names, own = {*named}, {*fixed} - declared.keys()

    def are_tied(alias: str, name: str) -> bool:
        return not given.are_two(alias, name) and equal(alias, name)

    aliases = {alias: name for alias, name in declared.items() if not {alias, name} <= names or are_tied(alias, name)}
    for twin, first in given.twins.items():
        name = aliases.get(first, first)
        if {twin, first} <= names and twin not in {name, *own, *aliases} and are_tied(twin, first):
            aliases[twin] = name
    return aliases


def _ends(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")


def _config(folder: Path | None) -> dict[str, Any]:
    try:
        config = json.loads((folder / CONFIG).read_bytes()) if folder is not None else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}


def _transformers_ties(folder: Path) -> Ties:
    """What transformers ties in a model of this config, which it makes without memory for its weights.

    Nothing where this process has not imported transformers, or it does not know the model. Never imports it.
    """
    torch, transformers = sys.modules.get("torch"), sys.modules.get("transformers")
    if torch is None or transformers is None:
        return {}
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        kind = getattr(transformers, config.architectures[0])
        if not issubclass(kind, transformers.PreTrainedModel):
            return {}
        with torch.device("meta"):
            return dict(kind(config).all_tied_weights_keys)
    except Exception:  # an unknown model, or a config it does not take: then nothing is known
        return {}
