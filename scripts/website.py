"""Build the documentation as one static site: README, docs/, and the Python API from the docstrings.

    python scripts/website.py FOLDER     builds it there; a warning is an error

Zensical renders it from a folder that holds the pages as the site names them, with links between them.
"""

import ast
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from posixpath import normpath

REPOSITORY = Path(__file__).resolve().parents[1]
OUTSIDE = ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md")
"""pages that do not lie in docs/"""
RENAMED = {"README.md": "index.md", "docs/README.md": "guides.md"}
"""pages whose name in the repository means something else on a site"""
ORDER = (
    "index", "guides", "DEMO", "CHOOSING", "TRAINERS", "VLLM", "DEPLOY", "OPERATIONS", "HUB", "STORES", "SECURITY",
    "PERFORMANCE", "SIZING", "CLI", "API", "DESIGN", "FORMAT", "ARCHITECTURE", "CONTRIBUTING", "CHANGELOG",
)  # fmt: skip
"""pages in the order of the menu; a page that is not named here comes last"""
POLICY = (
    """<meta http-equiv="Content-Security-Policy" content="default-src 'self' file: data: blob: 'unsafe-inline'">"""
)
"""in every page: a browser asks no other host for anything, whatever the theme's script would load"""
TITLES = {"index": "deltawire", "API": "Python API", "CLI": "Command line", "VLLM": "vLLM", "HUB": "Hugging Face"}
INTEGRATIONS = {
    "Follow without a vLLM server": ("deltawire.torch", "deltawire.vllm.in_process"),
    "Trainers": (
        "deltawire.trainers.hook", "deltawire.trainers.transformers", "deltawire.trainers.trl",
        "deltawire.trainers.lora", "deltawire.trainers.conversion", "deltawire.trainers.state",
    ),
    "Weights in fp8": ("deltawire.prepare.fp8",),
    "Stores": ("deltawire.buckets.base", "deltawire.buckets.conformance"),
    "Errors": ("deltawire.errors",),
}  # fmt: skip
"""modules whose public names are shown beside the package's own: heading -> modules"""
LINK = re.compile(r"(!?)\[([^\]]+)\]\(([^)#\s]*)(#[^)\s]*)?\)")


def pages() -> dict[str, str]:
    """Path in the repository -> page of the site."""
    documents = sorted(path.name for path in (REPOSITORY / "docs").glob("*.md"))
    sources = [*OUTSIDE, *(f"docs/{name}" for name in documents)]
    return {source: RENAMED.get(source, PurePosixPath(source).name) for source in sources}


def relink(text: str, source: str, known: dict[str, str]) -> str:
    """A page whose links lead to other pages of the site. What links to another file of the repository names it."""

    def replace(match: re.Match[str]) -> str:
        image, label, target, anchor = match[1], match[2], match[3], match[4] or ""
        if not target or "://" in target:
            return match[0]
        path = normpath(str(PurePosixPath(source).parent / target))
        if image:
            return f"![{label}]({path.removeprefix('docs/')})"
        if path in known:
            return f"[{label}]({known[path]}{anchor})"
        return label if label.strip("`") == path else f"{label} (`{path}`)"

    pieces = re.split(r"(?m)(^```[\s\S]*?^```$)", text)
    return "".join(piece if k % 2 else LINK.sub(replace, piece) for k, piece in enumerate(pieces))


def api_page() -> str:
    """The package's public names, then those of each integration, as mkdocstrings reads them."""
    return "\n\n".join(_api_parts()) + "\n"


def _api_parts() -> Iterator[str]:
    yield "# Python API"
    yield "Written from the docstrings. `import deltawire as dw` gives the names of the first part."
    yield "## deltawire"
    for name in public_names():
        yield f"::: deltawire.{name}"
    for heading, modules in INTEGRATIONS.items():
        yield f"## {heading}"
        for module in modules:
            yield f"::: {module}\n    options:\n      show_root_full_path: true"


def public_names() -> list[str]:
    """`deltawire.__all__`, read without an import."""
    tree = ast.parse((REPOSITORY / "src" / "deltawire" / "__init__.py").read_text())
    (names,) = (
        node.value for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    )
    return list(ast.literal_eval(names))


def menu(names: list[str]) -> str:
    """The site's `nav`, in ORDER."""

    def place(page: str) -> tuple[int, str]:
        name = page.removesuffix(".md")
        return (ORDER.index(name) if name in ORDER else len(ORDER), name)

    ordered = sorted(names, key=place)
    titled = [(TITLES.get(name := page.removesuffix(".md"), name.capitalize()), page) for page in ordered]
    return "nav:\n" + "".join(f"  - {title}: {page}\n" for title, page in titled)


def build(out: Path) -> None:
    """The site in `out`, which is replaced. Raises CalledProcessError when anything is wrong with it."""
    with tempfile.TemporaryDirectory(prefix="deltawire-site-") as temporary:
        work = Path(temporary)
        pictures = (REPOSITORY / "docs", work / "docs")
        shutil.copytree(*pictures, ignore=shutil.ignore_patterns("*.md"))
        (work / "source").symlink_to(REPOSITORY / "src")
        known = pages()
        for source, page in known.items():
            (work / "docs" / page).write_text(relink((REPOSITORY / source).read_text(), source, known))
        (work / "docs" / "API.md").write_text(api_page())
        settings = (REPOSITORY / "scripts" / "website.yml").read_text()
        (work / "mkdocs.yml").write_text(settings + menu([*known.values(), "API.md"]))
        subprocess.run([sys.executable, "-m", "zensical", "build", "--strict"], cwd=work, check=True)
        for page in (work / "site").rglob("*.html"):
            page.write_text(page.read_text().replace("<head>", f"<head>{POLICY}", 1))
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(work / "site", out)


if __name__ == "__main__":
    build(Path(sys.argv[1]))
