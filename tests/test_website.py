"""The documentation as one site: it builds without a warning, has every page and name, and asks no other host."""

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

import deltawire

REPOSITORY = Path(__file__).parents[1]
BUILDER = REPOSITORY / "scripts" / "website.py"
LOADS = {"link": "href", "script": "src", "img": "src", "iframe": "src", "source": "src", "object": "data"}
"""what a browser fetches by itself; `a` waits for a click"""
AWAY = re.compile(r"^\s*(https?:)?//", re.I)
IN_STYLES = re.compile(r"url\(\s*['\"]?([^'\")]+)|@import\s+['\"]([^'\"]+)", re.I)
POLICY = "default-src 'self' file: data: blob: 'unsafe-inline'"


def build(out: Path, builder: Path = BUILDER) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, builder, out], capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("site")
    done = build(out)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def urls_in(style: str) -> list[str]:
    return [one or other for one, other in IN_STYLES.findall(style)]


class Page(HTMLParser):
    """What a page loads, where it links, its anchors and its policy."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.links: list[str] = []
        self.ids: set[str] = set()
        self.policy: list[str] = []
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.ids |= {found["id"]} if found.get("id") else set()
        if tag in LOADS and found.get(LOADS[tag]):
            self.loaded.append(found[LOADS[tag]])
        self.loaded += urls_in(found.get("style") or "")
        if tag == "a" and found.get("href"):
            self.links.append(found["href"])
        if tag == "meta" and found.get("http-equiv") == "Content-Security-Policy":
            self.policy.append(found["content"])


def pages(site: Path) -> dict[str, Page]:
    return {path.name: Page(path) for path in sorted(site.glob("*.html"))}


def test_every_page_of_the_documentation_is_on_the_site(site):
    expected = {path.stem for path in (REPOSITORY / "docs").glob("*.md")} - {"README"}
    assert {path.stem for path in site.glob("*.html")} >= expected | {"index", "API", "ARCHITECTURE", "CONTRIBUTING"}


def test_every_public_name_has_its_place_in_the_api(site):
    ids = pages(site)["API.html"].ids
    assert {f"deltawire.{name}" for name in deltawire.__all__} <= ids
    assert {"deltawire.torch.follow", "deltawire.trainers.hook.publish_after_step", "deltawire.errors.Gap"} <= ids


def test_no_page_loads_anything_from_another_host(site):
    found = pages(site)
    assert [(name, url) for name, page in found.items() for url in page.loaded if AWAY.match(url)] == []
    assert {name for name, page in found.items() if page.policy != [POLICY]} == set()
    styles = list(site.rglob("*.css"))
    assert styles
    for style in styles:
        assert [url for url in urls_in(style.read_text()) if AWAY.match(url)] == []


def test_what_a_page_loads_and_links_is_there(site):
    found = pages(site)
    for name, page in found.items():
        for target in [*page.loaded, *page.links]:
            path, _, anchor = target.partition("#")
            if "://" in target or name == "404.html":
                continue
            assert (site / (path or name)).exists(), f"{name}: {target}"
            if anchor and path.endswith(".html") and not anchor.startswith("__"):
                assert anchor in found[Path(path).name].ids, f"{name}: {target}"


@pytest.mark.parametrize(
    ("right", "wrong"), [('"deltawire.errors"', '"deltawire.mistakes"'), ('"# Python API"', '"[x](NOWHERE.md)"')]
)
def test_a_name_or_a_link_that_leads_nowhere_fails_the_build(right, wrong, tmp_path):
    for name in ("src", "docs", "README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "website.yml").symlink_to(BUILDER.with_suffix(".yml"))
    text = BUILDER.read_text()
    assert right in text
    (tmp_path / "scripts" / "website.py").write_text(text.replace(right, wrong, 1))
    done = build(tmp_path / "site", tmp_path / "scripts" / "website.py")
    assert done.returncode != 0
    assert not (tmp_path / "site").exists()
