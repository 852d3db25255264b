"""The application's configuration, from a file and the command line's flags."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from blip2_serve.config import AppConfig
from blip2_serve.errors import StartupError
from blip2_serve.http.validation import explain


def read_config(file: Path | None, flags: Mapping[str, Any]) -> AppConfig:
    """Reads the YAML file, if any, and merges the nested `flags` over it.

    Raises:
        StartupError: the file cannot be read, or a key or value is wrong.
    """
    values = merged({} if file is None else _read_yaml(file), flags)
    try:
        return AppConfig.model_validate(values)
    except ValidationError as error:
        raise StartupError(f"configuration: {explain(error.errors(), values)}") from None


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Returns both mappings as one: `above` wins key by key, in nested mappings too."""
    result = {**below}
    for key, value in above.items():
        under = result.get(key)
        if isinstance(value, Mapping) and isinstance(under, Mapping):
            value = merged(under, value)
        result[key] = value
    return result


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(file.read_text()) or {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise StartupError(f"cannot read the configuration file {file}: {error}") from None
    if not isinstance(values, dict):
        raise StartupError(
            f"the configuration file {file} must be a mapping of keys to values, such as "
            "`model: demo`"
        )
    return values
