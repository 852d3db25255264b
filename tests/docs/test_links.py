"""Links between documents lead somewhere, and paths that documents name exist."""

from __future__ import annotations

import re
import string
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "serve" / "blip2_serve"
LAB = ROOT / "docs" / "lab"
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CHANGELOG.md", "serve/DESIGN.md")),
    *(ROOT / folder / "README.md" for folder in ("k8s", "loadtest")),
    *sorted((ROOT / "docs").rglob("*.md")),
]

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
# `folder/file.py`, `folder/`: in code marks, and it can be nothing but a path.
PATH = re.compile(r"`((?:[\w.-]+/)+(?:[\w-]+\.(?:py|md|json|ya?ml|env))?)`")
ELSEWHERE = ("/", "../../components/")  # of a container; of an overlay, which names it so


def without_code(text: str) -> str:
    """The text without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)


def anchors(document: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    kept = string.ascii_lowercase + string.digits + "-_ "
    titles = (title.lower() for title in HEADING.findall(without_code(document.read_text())))
    return {"".join(c for c in title if c in kept).replace(" ", "-") for title in titles}


def broken_links(document: Path) -> Iterator[str]:
    for link in LINK.findall(without_code(document.read_text())):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        if not target.exists() or (anchor and anchor not in anchors(target)):
            yield link


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    assert [*broken_links(document)] == []


# Lab notes are about the code of their day, the changelog about that of others.
CURRENT = [d for d in DOCUMENTS if LAB not in d.parents and d.name != "CHANGELOG.md"]


@pytest.mark.parametrize("document", CURRENT, ids=lambda path: str(path.relative_to(ROOT)))
def test_paths_exist(document: Path) -> None:
    """From the root, the package, the document's folder or, as manifests do, from k8s."""
    named = PATH.findall(without_code(document.read_text()))
    places = (ROOT, PACKAGE, document.parent, ROOT / "k8s", ROOT / "loadtest")
    missing = [
        name
        for name in named
        if not name.startswith(ELSEWHERE) and not any((place / name).exists() for place in places)
    ]
    assert missing == []


def test_the_map_of_the_design_names_files_that_exist() -> None:
    (block,) = re.findall(
        r"```text\n(.*?)```", (ROOT / "serve" / "DESIGN.md").read_text(), re.DOTALL
    )
    names = re.findall(r"^ *([\w/]+(?:\.py|/))", block, re.MULTILINE)
    assert len(names) > 8
    assert [name for name in names if not (PACKAGE / name).exists()] == []


def test_every_lab_note_is_listed() -> None:
    listed = set(LINK.findall((LAB / "README.md").read_text()))
    assert {path.name for path in LAB.glob("2*.md")} == {name for name in listed if "/" not in name}


def test_the_first_documents_stay_short() -> None:
    """A reader gives one screen to the first and ten minutes to the other."""
    assert len((ROOT / "README.md").read_text().split()) <= 700
    assert len((ROOT / "serve" / "DESIGN.md").read_text().splitlines()) <= 200
