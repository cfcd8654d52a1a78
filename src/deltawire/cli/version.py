"""Which deltawire this is, and which formats it writes and reads, taken from the constants that the code obeys."""

import sys
from dataclasses import dataclass

import msgspec

import deltawire
from deltawire.format import delta_file
from deltawire.live import rpc
from deltawire.runlog import records
from deltawire.runlog.records import Commit, Derived, Head, Run
from deltawire.weights.speed import why_no_numba

NAMES: dict[type[msgspec.Struct], str] = {
    Run: "run.json",
    Commit: "commit",
    Derived: "fold or anchor",
    Head: "HEAD.json",
}


@dataclass(frozen=True, slots=True)
class Format:
    """The versions of one kind of object: which are written, and which are read."""

    object: str
    writes: tuple[int, ...]
    reads: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class VersionReport:
    """The package's version with its formats, the codecs it reads, the protocol between follower and worker, and what
    runs its inner loops."""

    version: str
    formats: tuple[Format, ...]
    codecs: tuple[str, ...]
    protocol: int
    loops: str
    python: str


def report() -> VersionReport:
    """The versions of this installation."""
    recorded = [Format(name, *[records.formats_of(kind)] * 2) for kind, name in NAMES.items()]
    versions = tuple(map(int, delta_file.VERSIONS))
    delta = Format("delta file", versions, versions)
    return VersionReport(
        version=deltawire.__version__,
        formats=(delta, *recorded),
        codecs=delta_file.CODECS,
        protocol=rpc.PROTOCOL,
        loops="numba" if why_no_numba() is None else "numpy",
        python=sys.version.split()[0],
    )


def text_of(report: VersionReport) -> str:
    """The report as lines, the package's version first."""
    lines = [f"deltawire {report.version}"]
    for known in report.formats:
        lines.append(f"{known.object:<16}writes format {_either(known.writes)}, reads {_either(known.reads)}")
    lines.append(f"{'codecs':<16}{', '.join(report.codecs)}")
    lines.append(f"{'protocol':<16}{report.protocol}, between a follower and its server's workers")
    lines.append(f"{'inner loops':<16}{report.loops}")
    return "\n".join(lines)


def _either(versions: tuple[int, ...]) -> str:
    return " or ".join(map(str, versions))
