"""What a publish must give: the tensors of its run, each once, in the run's shapes; what a publisher may be asked for.

Errors that say what is wrong.
"""

import warnings
from collections.abc import Container, Iterable, Iterator, Mapping
from pathlib import Path
from typing import get_args

from deltawire.errors import MissingTensor, ShapeMismatch, UnknownTensor, UnknownVersion, some
from deltawire.format import checkpoint
from deltawire.prepare.names import bare, closest, is_adapters, require_bare
from deltawire.publish.devices import Asked, Lent
from deltawire.publish.ties import GivenTensor
from deltawire.runlog.bounds import require_assets
from deltawire.weights.bits import Bits
from deltawire.weights.table import TensorEntry

LISTED: Mapping[str, tuple[str, ...]] = {
    "subset": ("subset",),
    "class": ("subset", "class"),
    "auto": ("subset", "class"),
    "gap": (),
}
"""`codec` of a publisher -> the codecs that a run which begins with it lists"""
PACKED = ("U8", "I8", "I32")
"""dtypes that quantized weights are packed in"""
Table = Mapping[str, Bits | Lent] | Mapping[str, TensorEntry]
"""dtypes and shapes of a run's tensors, by name"""


def among(tensors: Iterable[GivenTensor], table: Table) -> Iterator[GivenTensor]:
    """The tensors whose names the table has. Raises UnknownTensor for all others at once, at the end."""
    unknown = []
    for given in tensors:
        if given.name in table:
            yield given
        else:
            unknown.append(given.name)
    if unknown:
        require_bare(name for name in unknown if not is_adapters(name) and bare(name) in table)
        raise foreign(unknown, table)


def foreign(names: list[str], table: Iterable[str]) -> UnknownTensor:
    """The error for tensors that a run does not have."""
    are, to = ("is", "") if len(names) == 1 else ("are", " to the first")
    near = closest(names[0], table)
    return UnknownTensor(
        f"{some(map(repr, names))} {are} not in this run's tensor table; closest there{to}: {near}. Leave out what is "
        "not to be published by Publisher(prepare=[…]), or begin a run of other tensors: another "
        'bucket, or Publisher(run="supersede")'
    )


def require_shape(name: str, shape: tuple[int, ...], table: Table) -> None:
    """Raise UnknownTensor or ShapeMismatch unless the table has such a tensor of this shape."""
    if name not in table:
        raise foreign([name], table)
    if shape != table[name].shape:
        raise ShapeMismatch(
            f"{name}: shape {list(shape)}, but this run has {list(table[name].shape)}; another model begins a run of "
            'its own: another bucket, or Publisher(run="supersede")'
        )


def require_due(name: str, seen: Container[str], trainable: Container[str] | None) -> None:
    """Raise UnknownTensor for a tensor that this publish gave already, or that is not among the run's trainable."""
    if name in seen:
        raise UnknownTensor(f"{name!r} was given twice")
    if trainable is not None and name not in trainable:
        raise UnknownTensor(f"{name!r} is frozen in this run: its first publish did not name it")


def require_all(seen: Iterable[str], trainable: set[str] | None) -> None:
    """Raise MissingTensor unless a publish gave something, and every one of the run's trainable tensors."""
    if not (given := set(seen)):
        raise MissingTensor("no tensors were given: pass model.named_parameters()")
    if trainable is not None and (missing := trainable - given):
        raise MissingTensor(
            f"{len(missing)} tensors of this run were not given: {some(sorted(missing))}; every publish names exactly "
            "the tensors the first one did"
        )


def warn_of_packed(table: Iterable[TensorEntry]) -> None:
    """Warn of matrices of integers in a run that begins without a base: most likely quantized weights."""
    packed = [entry for entry in table if entry.dtype in PACKED and len(entry.shape) > 1]
    if packed:
        tensors = some(f"{entry.name} ({entry.dtype} {list(entry.shape)})" for entry in packed)
        warnings.warn(
            f"{len(packed)} tensors of this run hold integers: {tensors}. Quantized weights (bitsandbytes, GPTQ) are "
            "published bit for bit. The state that unpacks them is not a parameter, so it is not published. Publish "
            "them dequantized, or begin the run with Publisher(base=…), the checkpoint that holds them so",
            stacklevel=2,
        )


def require_usable(assets: Path) -> None:
    """Raise NotFound for a folder of assets that is not there, and TooLarge for one whose files no reader would fetch.

    Called on opening, so that neither waits for the first publish.
    """
    require_assets({path.name: path.stat().st_size for path in checkpoint.assets(assets)}, str(assets))


def require_options(bucket: object, *, codec: str, run: str, resume: str, baseline: str) -> None:
    """Raise UnknownVersion, TypeError or ValueError for options that no publisher takes."""
    if codec not in LISTED:
        raise UnknownVersion(f'codec {codec!r} cannot be published; use "subset", "class", "auto" or "gap"')
    if isinstance(bucket, str):
        raise TypeError("a Publisher takes an opened bucket, not its address: pass deltawire.open_bucket(address)")
    if run not in ("continue", "supersede"):
        raise ValueError(f'run={run!r}: "continue" or "supersede"')
    if resume not in ("warn", "require") or (resume, run) == ("require", "supersede"):
        raise ValueError(f'resume={resume!r}: "warn", or "require", which goes with run="continue"')
    if baseline not in get_args(Asked):
        raise ValueError(f"baseline={baseline!r}: {', '.join(map(repr, get_args(Asked)))}")
