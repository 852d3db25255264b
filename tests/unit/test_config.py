"""The configuration: checked, frozen, documented, and readable from what Serve passes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from ray.serve import Application
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary

from blip2_serve.app import build
from blip2_serve.config import AppConfig


@pytest.mark.parametrize(
    ("values", "key"),
    [
        pytest.param({"modle": "demo"}, "modle", id="at the top"),
        pytest.param({"generator": {"max_runing": 1}}, "generator.max_runing", id="of a stage"),
        pytest.param(
            {"ingress": {"images": {"allow_url": True}}},
            "ingress.images.allow_url",
            id="deep inside",
        ),
    ],
)
def test_an_unknown_key_is_an_error_that_names_it(values: dict[str, Any], key: str) -> None:
    with pytest.raises(ValidationError) as caught:
        AppConfig.model_validate(values)

    assert key in str(caught.value)


@pytest.mark.parametrize(
    "values",
    [
        pytest.param({"device": "tpu"}, id="an unknown device"),
        pytest.param({"dtype": "float64"}, id="an unknown dtype"),
        pytest.param({"max_model_len": 0}, id="no positions"),
        pytest.param({"encoder": {"num_replicas": 0}}, id="no replicas"),
        pytest.param({"encoder": {"max_batch_size": 0}}, id="empty batches"),
        pytest.param(
            {"encoder": {"scaling": {"backlog_drain_s": 0}}}, id="a backlog drained in no time"
        ),
        pytest.param(
            {"encoder": {"scaling": {"target_utilization": 1.2}}}, id="more than replicas can do"
        ),
        pytest.param({"encoder": {"scaling": {"headroom": -0.1}}}, id="less than no headroom"),
        pytest.param({"generator": {"max_num_batched_tokens": 1}}, id="steps of one token"),
        pytest.param({"generator": {"kv_memory_fraction": 1.5}}, id="more than all memory"),
        pytest.param({"generator": {"quantize": "int4"}}, id="weights of 4 bits"),
        pytest.param({"encoder": {"quantize": "int8"}}, id="an encoder in int8"),
        pytest.param({"ingress": {"feature_cache_entries": -1}}, id="fewer than no entries"),
        pytest.param({"ingress": {"cors_origins": ["https://a.b/"]}}, id="an origin with a slash"),
        pytest.param({"ingress": {"cors_origins": ["a.b"]}}, id="an origin without a scheme"),
        pytest.param({"ingress": {"cors_origins": ["https://*.a.b"]}}, id="a star in an origin"),
    ],
)
def test_a_wrong_value_is_an_error(values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        AppConfig.model_validate(values)


@pytest.mark.parametrize("origin", ["https://a.b", "http://localhost:3000", "*", "null"])
def test_origins_are_taken_as_browsers_send_them(origin: str) -> None:
    config = AppConfig.model_validate({"ingress": {"cors_origins": [origin]}})

    assert config.ingress.cors_origins == (origin,)


def test_the_configuration_cannot_be_changed() -> None:
    config = AppConfig()

    with pytest.raises(ValidationError):
        config.model = "other"  # type: ignore[misc]
    with pytest.raises(ValidationError):
        config.ingress.images.allow_urls = True  # type: ignore[misc]


def fields_of(model: type[BaseModel], place: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """All fields by their dotted name, those of nested models included."""
    for name, field in model.model_fields.items():
        yield f"{place}{name}", field
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from fields_of(field.annotation, f"{place}{name}.")


FIELDS = dict(fields_of(AppConfig))


def test_fields_of_nested_models_are_found() -> None:
    assert {"model", "encoder.num_cpus", "ingress.scaling.headroom"} <= FIELDS.keys()


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_has_a_description_that_stands_alone(name: str) -> None:
    description = FIELDS[name].description
    assert description, "for docs/configuration.md"
    assert re.fullmatch(r"[A-Z].*\.", description, re.DOTALL), description


def test_weights_are_not_quantized_by_default() -> None:
    assert AppConfig().generator.quantize is None
    assert AppConfig().encoder.quantize is None


def test_strings_become_values_of_the_fields_types() -> None:
    config = AppConfig.model_validate(
        {
            "max_model_len": "128",
            "generator": {
                "max_num_seqs": "4",
                "kv_memory_fraction": "0.5",
                "prefix_caching": "false",
            },
            "ingress": {"images": {"allow_urls": "true"}},
        }
    )

    assert config.max_model_len == 128
    assert config.generator.max_num_seqs == 4
    assert config.generator.kv_memory_fraction == 0.5
    assert config.generator.prefix_caching is False
    assert config.ingress.images.allow_urls is True


def test_serve_run_can_pass_its_key_value_arguments_to_the_builder() -> None:
    # As in `serve run blip2_serve.app:build device=cpu max_model_len=128`, or from `args` in a
    # Serve config file.
    arguments = {"device": "cpu", "max_model_len": "128"}

    assert isinstance(call_user_app_builder_with_args_if_necessary(build, arguments), Application)


def test_serve_run_refuses_an_argument_that_does_not_exist() -> None:
    with pytest.raises(ValidationError, match="devcie"):
        call_user_app_builder_with_args_if_necessary(build, {"devcie": "cpu"})


@pytest.mark.parametrize(
    ("values", "name"),
    [
        pytest.param({}, "demo", id="the shipped checkpoint"),
        pytest.param(
            {"model": "Salesforce/blip2-opt-2.7b"}, "Salesforce/blip2-opt-2.7b", id="a hub id"
        ),
        pytest.param({"model": "a/b", "served_model_name": "c"}, "c", id="a name that is given"),
    ],
)
def test_clients_see_the_models_name(values: dict[str, Any], name: str) -> None:
    assert AppConfig.model_validate(values).model_name == name


@pytest.mark.parametrize("spelling", ["{}", "{}/", "{}/../my-model", "~/my-model"])
def test_clients_see_the_name_of_a_folder_and_not_its_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spelling: str
) -> None:
    folder = tmp_path / "my-model"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))

    assert AppConfig(model=spelling.format(folder)).model_name == "my-model"


def test_clients_see_the_name_of_the_folder_that_a_server_is_started_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "my-model"
    folder.mkdir()
    monkeypatch.chdir(folder)

    assert AppConfig(model=".").model_name == "my-model"
