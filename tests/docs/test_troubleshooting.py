"""What people look up is what they saw: messages and codes in the troubleshooting page exist."""

from __future__ import annotations

import re
from pathlib import Path

from blip2_serve import errors

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()


def rows(heading: str) -> list[list[str]]:
    """The cells of the table under a heading, without its head."""
    section = PAGE.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_messages_are_those_of_the_code() -> None:
    sources = (ROOT / "serve" / "blip2_serve").rglob("*.py")
    # Long messages are written in pieces.
    said = "\n".join(re.sub(r'"\n\s*f?"', "", file.read_text()) for file in sources)
    quoted = [text for row in rows("It does not start") for text in re.findall("`(.+?)`", row[0])]
    assert len(quoted) > 8
    for text in quoted:
        for piece in text.split("..."):
            assert piece.strip() in said, text


def test_codes_are_those_of_the_errors() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    known = {(str(k.status), k.code) for k in kinds if issubclass(k, errors.Blip2ServeError)}
    found = {(status, code.strip("`")) for status, code, *_ in rows("It refuses")}
    assert len(found) > 6
    assert found <= known
