"""Imports go strictly down the rooms of ARCHITECTURE.md, and only integrations import what they integrate.

The table's rows read `| `room/` | what belongs there |`, the lowest room first. The package root stands above all.
Inside a room modules may import each other, without a cycle.
"""

import ast
import re
import subprocess
import sys
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
SOURCE = REPOSITORY / "src" / "deltawire"
ROOT = "__init__"
ROW = re.compile(r"^\|\s*`([\w.]+)/?`\s*\|")
INTEGRATED = ("vllm", "trl", "transformers", "torch.distributed")
MAY_INTEGRATE = ("torch", "vllm", "trainers", "demo", "publish.sharded.ranks")
"""the only entries of the table that may import what is integrated; everything else runs without it. `ranks` lies low
because a publisher of a sharded job adds up through it, and imports torch.distributed only where there is such a job"""
MAY_IMPORT_ROOT = ("demo", "cli")
HEAVY = ("torch", "vllm", "trl", "transformers", "huggingface_hub", "openenv")


def parse_table(text: str) -> dict[str, int]:
    """Room -> its layer, the lowest first."""
    rooms = [match[1] for line in text.splitlines() if (match := ROW.match(line))]
    assert len(set(rooms)) == len(rooms), "a room stands twice in the table of ARCHITECTURE.md"
    return {room: layer for layer, room in enumerate(rooms)}


@cache
def table() -> dict[str, int]:
    entries = parse_table((REPOSITORY / "ARCHITECTURE.md").read_text())
    return {ROOT: max(entries.values()) + 1, **entries}


def name_of(path: Path) -> str:
    """A file's module, without the leading `deltawire.`; ROOT for the package itself."""
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == ROOT and len(parts) > 1 else parts)


PATHS = {name_of(path): path for path in sorted(SOURCE.rglob("*.py"))}


def entry_of(module: str, entries: dict[str, int]) -> str | None:
    """The most specific entry that covers a module."""
    parts = module.split(".")
    covers = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
    return next((name for name in covers if name in entries), None)


def imported(source: str) -> list[str]:
    """Every dotted name a source imports, at its top or inside a function."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute in this package"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def own_imports(source: str, modules: set[str]) -> set[str]:
    """The modules of this package that a source imports."""
    found = set()
    for name in imported(source):
        if name.split(".")[0] != "deltawire":
            continue
        inside = name.removeprefix("deltawire").removeprefix(".")
        while inside and inside not in modules:
            inside = inside.rpartition(".")[0]
        found.add(inside or ROOT)
    return found


def upward(module: str, imports: set[str], entries: dict[str, int]) -> set[str]:
    """Which of its imports a module may not have."""
    own = entry_of(module, entries)
    refused = set()
    for other in imports:
        entry = entry_of(other, entries)
        if other == ROOT and module.split(".", maxsplit=1)[0] in MAY_IMPORT_ROOT:
            continue
        if entry is None or own is None or (entry != own and entries[entry] >= entries[own]):
            refused.add(other)
    return refused


@pytest.mark.parametrize("module", PATHS)
def test_every_module_is_in_the_layer_table(module):
    assert entry_of(module, table()), f"{module} is in no row of ARCHITECTURE.md's table of rooms"


@pytest.mark.parametrize("module", PATHS)
def test_imports_go_strictly_down(module):
    imports = own_imports(PATHS[module].read_text(), set(PATHS))
    assert upward(module, imports, table()) == set()


def test_no_two_modules_import_each_other():
    graph = {module: own_imports(path.read_text(), set(PATHS)) - {module, ROOT} for module, path in PATHS.items()}
    assert len(list(TopologicalSorter(graph).static_order())) >= len(graph) - 1


def test_the_bucket_server_knows_nothing_of_the_package_but_its_errors():
    server = [path for module, path in PATHS.items() if module.split(".")[0] == "hub_server"]
    assert server
    for path in server:
        own = {name for name in own_imports(path.read_text(), set(PATHS)) if name.split(".")[0] != "hub_server"}
        assert own <= {"errors"}, path


@pytest.mark.parametrize("module", PATHS)
def test_only_integrations_import_what_they_integrate(module):
    if module.split(".")[0] in MAY_INTEGRATE or module in MAY_INTEGRATE:
        return
    names = imported(PATHS[module].read_text())
    assert [name for name in names for banned in INTEGRATED if f"{name}.".startswith(f"{banned}.")] == []


def test_importing_deltawire_loads_no_extra():
    code = f"import sys, deltawire; print(*[name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == []


TABLE = "| room | what |\n|---|---|\n| `errors` | why |\n| `a` | why |\n| `pack.low` | why |\n| `pack/` | why |"
MODULES = {"errors", "a", "pack", "pack.low", "pack.high", "demo.page"}


@pytest.mark.parametrize(
    ("module", "source", "refused"),
    [
        ("a", "from deltawire.errors import Gap", set()),
        ("a", "def f():\n    from deltawire.pack import high", {"pack.high"}),
        ("a", "import deltawire.pack.low", {"pack.low"}),
        ("pack.high", "from deltawire.pack.low import x\nfrom deltawire.pack import y", set()),
        ("pack.low", "from deltawire.pack.high import x", {"pack.high"}),
        ("errors", "from deltawire import a, Delta", {"a", ROOT}),
        ("demo.page", "from deltawire import Delta", set()),
    ],
)
def test_the_check_itself_finds_an_import_that_goes_up(module, source, refused):
    entries = parse_table(TABLE)
    assert entries == {"errors": 0, "a": 1, "pack.low": 2, "pack": 3}
    assert upward(module, own_imports(source, MODULES), entries) == refused
