"""The tables of documents are those that docs/tables.py makes, and nothing is left out."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, Field

from blip2_serve import errors
from blip2_serve.config import AppConfig
from blip2_serve.errors import Blip2ServeError, StartupError
from blip2_serve.observe import metrics

DOCS = Path(__file__).parents[2] / "docs"


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"docs_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


tables = load(DOCS / "tables.py")


@pytest.mark.parametrize("document", tables.DOCUMENTS, ids=lambda path: path.name)
def test_tables_are_up_to_date(document: Path) -> None:
    text = document.read_text()
    assert tables.rewritten(text) == text, "run python docs/tables.py"


def test_every_table_stands_in_one_document() -> None:
    text = "".join(document.read_text() for document in tables.DOCUMENTS)
    assert sorted(re.findall(r"<!-- table: ([\w.]+) -->", text)) == sorted(tables.TABLES)


def test_every_key_of_the_configuration_is_documented() -> None:
    text = (DOCS / "configuration.md").read_text()
    assert [key for key in leaves(AppConfig) if f"`{key}`" not in text] == []


def leaves(model: type[BaseModel]) -> Iterator[str]:
    """Names of keys that hold no further ones."""
    for name, field in model.model_fields.items():
        if isinstance(field.default, BaseModel):
            section = type(field.default)
            own = leaves(section)
            # Sections within a stage are named with their keys; stages and `scaling` have tables.
            named = name in ("images", "chat", "admission", "access")
            yield from (f"{name}.{key}" if named else key for key in own)
        else:
            yield name


def test_every_error_is_documented() -> None:
    text = (DOCS / "api.md").read_text()
    kinds = [e for e in vars(errors).values() if isinstance(e, type) and e is not StartupError]
    for kind in kinds:
        if issubclass(kind, Blip2ServeError):
            code = f"`{kind.code}`" if kind.code else ""
            assert f"| {kind.status} | `{kind.type}` | {code} |" in text, kind


PROSE = [*DOCS.glob("*.md"), *(DOCS.parent / name for name in ("README.md", "k8s/README.md"))]


@pytest.mark.parametrize("document", PROSE, ids=lambda path: str(path.relative_to(DOCS.parent)))
def test_metrics_that_a_document_names_exist(document: Path) -> None:
    known = {metric.exported for metric in metrics.catalogue()}
    named = re.findall(r"\bray_blip2_\w+", document.read_text())
    parts = ("_bucket", "_count", "_sum")
    assert {n for n in named if n not in known and not n.endswith(parts)} == set()
    whole = {n.rpartition("_")[0] for n in named if n not in known}
    assert whole <= known


@pytest.mark.parametrize("document", PROSE, ids=lambda path: str(path.relative_to(DOCS.parent)))
def test_keys_that_a_document_names_exist(document: Path) -> None:
    for stage, path in re.findall(
        rf"`({'|'.join(tables.STAGES)})\.([a-z_.]+)`", document.read_text()
    ):
        model: type[BaseModel] = tables.STAGES[stage]
        for name in path.split("."):
            assert name in model.model_fields, f"{stage}.{path}"
            model = type(model.model_fields[name].default)


class Section(BaseModel):
    key: int = Field(1, ge=1, le=8, description="a | b")


class Heir(Section):
    key: int = 2


class Example(BaseModel):
    must: str
    text: str | None = None
    choice: Literal["a", "b", "c"] = "a"
    many: Annotated[list[str], Field(max_length=3)] = []
    either: bool | Literal["never"] = False
    share: float = Field(0.5, gt=0, le=1)
    size: int = Field(3 << 20, ge=1)
    large: int = Field(0, ge=-(1 << 63))
    section: Section = Section()
    heir: Heir = Heir()
    sections: list[Section] = []
    nothing: Annotated[dict[str, int], Field(max_length=0)] = {}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("must", "string"),
        ("text", "string"),
        ("choice", '`"a"`, `"b"` or `"c"`'),
        ("many", "list of strings, at most 3"),
        ("either", 'boolean or `"never"`'),
        ("share", "number, above 0 and at most 1"),
        ("size", "integer, at least 1"),
        ("large", "integer"),
        ("section", "object with `key`"),
        ("sections", "list of objects"),
        ("nothing", "empty object"),
    ],
)
def test_types_in_words(name: str, words: str) -> None:
    assert tables.type_of(Example, name) == words


@pytest.mark.parametrize(
    ("row"),
    [
        "| `must` | string | required |  |",
        "| `text` | string | `null` |  |",
        "| `size` | integer, at least 1 | `3145728` (3 MiB) |  |",
        r"| `section.key` | integer, 1 to 8 | `1` | a \| b |",
        r"| `heir.key` | integer | `2` | a \| b |",  # says what its base says
    ],
)
def test_rows_of_a_configuration(row: str) -> None:
    assert row in tables.keys(Example).splitlines()


def test_defaults_that_differ_are_told_by_their_owner() -> None:
    table = tables.common_keys(Section, {"one": Section, "two": Heir})
    assert r"| `key` | integer, 1 to 8 | one `1`, two `2` | a \| b |" in table


@pytest.mark.parametrize("text", ["<!-- table: metrics -->\nold\n<!-- end -->\n"])
def test_only_the_block_is_rewritten(text: str) -> None:
    around = f"before\n{text}after\n"
    new: Any = tables.rewritten(around)
    assert new.startswith("before\n<!-- table: metrics -->\n| metric |")
    assert new.endswith("|\n<!-- end -->\nafter\n")


def test_an_unknown_table_is_an_error() -> None:
    with pytest.raises(KeyError, match="nothing"):
        tables.rewritten("<!-- table: nothing -->\n<!-- end -->")
