"""Writes the tables of the documents that are made from the code.

    python docs/tables.py            # rewrites them
    python docs/tables.py --check    # changes nothing, and fails where one is out of date

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; `TABLES` has the names.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from blip2_serve.config import AppConfig, EncoderConfig, GeneratorConfig, PreprocessorConfig
from blip2_serve.http.compatibility import OpenAIFields
from blip2_serve.http.schema import (
    CaptionRequest,
    ChatRequest,
    ChunkFields,
    GenerateRequest,
)
from blip2_serve.http.schema_completions import CompletionRequest
from blip2_serve.http.schema_generation import GenerationFields
from blip2_serve.http.schema_responses import ResponsesRequest
from blip2_serve.ingress_config import IngressConfig
from blip2_serve.observe import metrics
from blip2_serve.stage_config import ComputeConfig, ScalingConfig, StageConfig
from blip2_serve.types import SamplingParams

FOLDER = Path(__file__).parent
DOCUMENTS = tuple(FOLDER / name for name in ("api.md", "configuration.md", "metrics.md"))

STAGES: Mapping[str, type[StageConfig]] = {
    "ingress": IngressConfig,
    "preprocessor": PreprocessorConfig,
    "encoder": EncoderConfig,
    "generator": GeneratorConfig,
}

_BLOCK = re.compile(r"(<!-- table: (?P<name>[\w.]+) -->\n).*?(<!-- end -->)", re.DOTALL)
_MIB = 1 << 20
_EXACT = 1 << 53  # a bound beyond what JSON numbers hold says nothing to a reader

Schema = dict[str, Any]


def main() -> None:
    """The command; exits with 1 where a table is out of date."""
    outdated = []
    for document in DOCUMENTS:
        text = document.read_text()
        if (new := rewritten(text)) != text:
            outdated.append(str(document.relative_to(FOLDER.parent)))
            if "--check" not in sys.argv[1:]:
                document.write_text(new)
    if "--check" in sys.argv[1:] and outdated:
        sys.exit(f"out of date: {', '.join(outdated)}; run python docs/tables.py")


def rewritten(text: str) -> str:
    """A document's text with all of its tables made anew.

    Raises:
        KeyError: a marker names an unknown table.
    """
    return _BLOCK.sub(lambda m: f"{m[1]}{TABLES[m['name']]()}\n{m[3]}", text)


def markdown(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table; cells may hold pipes."""

    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"

    head = [*head]
    return "\n".join([line(head), "|" + "---|" * len(head), *map(line, rows)])


# -- types and values ------------------------------------------------------------------------------


def type_of(model: type[BaseModel], name: str) -> str:
    """A field's type in words: "integer, 1 to 8", "string or list of strings"."""
    schema = model.model_json_schema()
    return _described(schema["properties"][name], schema.get("$defs", {}))


def _described(schema: Schema, defs: Schema) -> str:
    if "$ref" in schema:
        return _described(defs[schema["$ref"].rpartition("/")[2]], defs)
    if "anyOf" in schema:
        kinds = [_described(s, defs) for s in schema["anyOf"] if s.get("type") != "null"]
        return _one_of(kinds)
    if "enum" in schema or "const" in schema:
        values = schema.get("enum", [schema.get("const")])
        return _one_of([f"`{json.dumps(value)}`" for value in values])
    kind = schema.get("type", "object")
    if kind == "array":
        return _array(schema, defs)
    if kind == "object":
        return _object(schema)
    return _bounded(kind, schema)


def _object(schema: Schema) -> str:
    if schema.get("maxProperties") == 0:
        return "empty object"
    names = ", ".join(f"`{name}`" for name in schema.get("properties", ()))
    return f"object with {names}" if names else "object"


def _one_of(kinds: list[str]) -> str:
    """ "a", "a or b", "a, b or c"; nothing at all is null."""
    if not kinds:
        return "`null`"
    return " or ".join(filter(None, [", ".join(kinds[:-1]), kinds[-1]]))


def _array(schema: Schema, defs: Schema) -> str:
    if schema.get("maxItems") == 0:
        return "empty list"
    # In short, without bounds and properties.
    items = re.split(", | with ", _described(schema.get("items", {}), defs))[0]
    most = f", at most {schema['maxItems']}" if "maxItems" in schema else ""
    return f"list of {items}{'' if items.endswith('`') else 's'}{most}"


def _bounded(kind: str, schema: Schema) -> str:
    def bound(key: str) -> Any:
        value = schema.get(key)
        return None if value is None or abs(value) >= _EXACT else value

    least, above = bound("minimum"), bound("exclusiveMinimum")
    most, below = bound("maximum"), bound("exclusiveMaximum")
    if least is not None and most is not None:
        return f"{kind}, {_number(least)} to {_number(most)}"
    low = f"at least {_number(least)}" if least is not None else ""
    low = f"above {_number(above)}" if above is not None else low
    high = f"at most {_number(most)}" if most is not None else ""
    high = f"below {_number(below)}" if below is not None else high
    return ", ".join(filter(None, [kind, " and ".join(filter(None, [low, high]))]))


def _number(value: float) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def value_of(default: Any) -> str:
    """A default as YAML and JSON have it, in code marks; bytes with their MiB."""
    if default is PydanticUndefined:
        return "required"
    if isinstance(default, int) and default >= _MIB and default % _MIB == 0:
        return f"`{default}` ({default // _MIB} MiB)"
    return f"`{_number(default) if isinstance(default, float) else json.dumps(default)}`"


def _description(model: type[BaseModel], name: str) -> str:
    """The field's own, or the one of the class that it overrides."""
    kinds = (cls for cls in model.__mro__ if issubclass(cls, BaseModel) and cls is not BaseModel)
    fields = (cls.model_fields[name] for cls in kinds if name in cls.model_fields)
    return next((field.description for field in fields if field.description), "")


# -- request parameters ----------------------------------------------------------------------------


def parameters(model: type[BaseModel], *without: type[BaseModel]) -> str:
    """The fields of a request body that are not fields of `without`."""
    known = {name for other in without for name in other.model_fields}
    rows = (
        (f"`{name}`", type_of(model, name), _effective(name, field), _description(model, name))
        for name, field in model.model_fields.items()
        if name not in known
    )
    return markdown(("parameter", "type", "default", "meaning"), rows)


def _effective(name: str, field: FieldInfo) -> str:
    """The value that a missing parameter has; the body's model has None for it."""
    if field.is_required():
        return "required"
    if name == "seed":
        return "random"
    if name in ("max_tokens", "max_completion_tokens"):
        return value_of(GeneratorConfig().default_max_tokens)
    defaults = {f.name: f.default for f in dataclasses.fields(SamplingParams)}
    if name in defaults and defaults[name] not in (None, ()):
        return value_of(defaults[name])
    if field.default is None and bool in getattr(field.annotation, "__args__", ()):
        return "`false`"
    return "" if field.default is None else value_of(_default(field))


# -- configuration ---------------------------------------------------------------------------------


def keys(model: type[BaseModel], *without: type[BaseModel]) -> str:
    """The keys of a configuration, those of sections within as `section.key`."""
    known = {name for other in without for name in other.model_fields}
    return markdown(("key", "type", "default", "meaning"), _key_rows(model, known))


def _key_rows(
    model: type[BaseModel], known: set[str], prefix: str = ""
) -> Iterable[tuple[str, str, str, str]]:
    for name, field in model.model_fields.items():
        if name in known:
            continue
        if section := _section(field):
            yield from _key_rows(section, set(), f"{prefix}{name}.")
            continue
        meaning = _description(model, name)
        yield f"`{prefix}{name}`", type_of(model, name), value_of(_default(field)), meaning


def _section(field: FieldInfo) -> type[BaseModel] | None:
    """The model of a key that holds further keys."""
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def _default(field: FieldInfo) -> Any:
    return field.get_default(call_default_factory=True, validated_data={})


def common_keys(base: type[BaseModel], of: Mapping[str, type[BaseModel]]) -> str:
    """The keys of `base`, with the defaults that its heirs have, by the heirs' names."""
    rows = []
    for name, field in base.model_fields.items():
        if _section(field):
            continue
        defaults = {heir: value_of(_default(m.model_fields[name])) for heir, m in of.items()}
        if len({*defaults.values()}) == 1:
            (default,) = {*defaults.values()}
        else:
            default = ", ".join(f"{heir} {value}" for heir, value in defaults.items())
        rows.append((f"`{name}`", type_of(base, name), default, _description(base, name)))
    return markdown(("key", "type", "default", "meaning"), rows)


def _application() -> str:
    rows = _key_rows(AppConfig, {*STAGES})
    return markdown(("key", "type", "default", "meaning"), rows)


def _scaling() -> str:
    kinds = {stage: _section(model.model_fields["scaling"]) for stage, model in STAGES.items()}
    return common_keys(ScalingConfig, {stage: kind for stage, kind in kinds.items() if kind})


_SHARED = (GenerationFields, OpenAIFields)

TABLES: Mapping[str, Callable[[], str]] = {
    "parameters": lambda: parameters(GenerationFields),
    "parameters.openai": lambda: parameters(OpenAIFields),
    "parameters.stream": lambda: parameters(ChunkFields),
    "parameters.chat": lambda: parameters(ChatRequest, *_SHARED, ChunkFields),
    "parameters.generate": lambda: parameters(GenerateRequest, *_SHARED, ChunkFields),
    "parameters.completions": lambda: parameters(CompletionRequest, GenerateRequest),
    "parameters.responses": lambda: parameters(ResponsesRequest, *_SHARED, ChunkFields),
    "parameters.caption": lambda: parameters(CaptionRequest, *_SHARED),
    "config": _application,
    "config.stages": lambda: common_keys(StageConfig, STAGES),
    "config.scaling": _scaling,
    "config.ingress": lambda: keys(IngressConfig, StageConfig),
    "config.preprocessor": lambda: keys(PreprocessorConfig, StageConfig),
    "config.compute": lambda: keys(ComputeConfig, StageConfig),
    "config.encoder": lambda: keys(EncoderConfig, ComputeConfig),
    "config.generator": lambda: keys(GeneratorConfig, ComputeConfig),
    "metrics": metrics.table,
}

if __name__ == "__main__":
    main()
