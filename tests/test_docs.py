"""README and docs: the first screen's figures are stored rows, links lead somewhere, every page is in the index."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def anchors(path):
    """Return the anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    heads = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


def test_the_index_has_every_page():
    told = re.findall(r"\((\w+\.md)\)", (ROOT / "docs" / "README.md").read_text(encoding="utf-8"))
    assert {*told, "README.md"} == {path.name for path in (ROOT / "docs").glob("*.md")}


def test_the_first_screen_has_the_stored_rows():
    spec = importlib.util.spec_from_file_location("first_screen", ROOT / "eval" / "benchmarks" / "first_screen.py")
    first_screen = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(first_screen)
    text = README.read_text(encoding="utf-8")
    told = text.partition(first_screen.BEGIN)[2].partition(first_screen.END)[0]
    assert told == first_screen.table()
    assert len(text.partition("\n## ")[0].splitlines()) <= 40
