"""The file of API keys: written by a command, read while the server runs."""

from __future__ import annotations

import logging
import os
import stat
from pathlib import Path

import pytest
import yaml

from blip2_serve.errors import StartupError
from blip2_serve.http.keys import KeyFile, add_key, hash_of, parse

SECRET = "blip2-secret"
ENTRY = f"- name: alice\n  sha256: {hash_of(SECRET)}\n"


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys.yaml"


def test_a_key_is_added_as_a_hash_that_only_the_owner_reads(file: Path) -> None:
    secret = add_key(file, "alice", requests_per_minute=60.0, max_concurrent=None)

    (entry,) = yaml.safe_load(file.read_text())
    assert entry == {"name": "alice", "sha256": hash_of(secret), "requests_per_minute": 60.0}
    assert secret not in file.read_text()
    assert len(secret) > 40
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [*file.parent.iterdir()] == [file]


def test_a_file_stays_readable_for_its_group(file: Path) -> None:
    file.write_text(ENTRY)
    file.chmod(0o640)
    add_key(file, "bob")

    assert stat.S_IMODE(file.stat().st_mode) == 0o640


def test_other_keys_and_comments_stay(file: Path) -> None:
    file.write_text(f"# of the team\n{ENTRY}")
    secrets = [add_key(file, name) for name in ("bob", "carol")]

    assert file.read_text().startswith(f"# of the team\n{ENTRY}")
    keys = KeyFile(file)
    found = [keys.find(secret) for secret in (SECRET, *secrets)]
    assert [key and key.name for key in found] == ["alice", "bob", "carol"]


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        pytest.param(ENTRY, "alice", "same name", id="a name twice"),
        pytest.param(ENTRY, "a b", "name", id="a name with a blank"),
        pytest.param(ENTRY, "", "name", id="no name"),
        pytest.param("keys: [", "bob", "not YAML", id="not YAML"),
        pytest.param("a: b", "bob", "tuple", id="not a list"),
        pytest.param("- name: x\n", "bob", "sha256", id="no hash"),
    ],
)
def test_a_key_that_cannot_be_added_leaves_the_file_alone(
    file: Path, text: str, name: str, message: str
) -> None:
    file.write_text(text)

    with pytest.raises(StartupError, match=message):
        add_key(file, name)
    assert file.read_text() == text
    assert [*file.parent.iterdir()] == [file]


@pytest.mark.parametrize(
    "text",
    [
        f"- name: alice\n  sha256: {SECRET}\n",
        f"- name: alice\n  key: {SECRET}\n",
        f"- name: '{SECRET} {SECRET}'\n  sha256: {hash_of(SECRET)}\n",
        f"- {SECRET}\n",
        f"{SECRET}: {{",
        ENTRY + f"  requests_per_minute: {SECRET}\n",
        ENTRY + ENTRY.replace("alice", "bob"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_without_quoting_it(file: Path, text: str) -> None:
    file.write_text(text)

    with pytest.raises(StartupError) as caught:
        KeyFile(file)
    assert str(file) in str(caught.value)
    assert SECRET not in str(caught.value)


def test_a_file_that_is_missing_is_an_error(file: Path) -> None:
    with pytest.raises(StartupError, match=r"keys\.yaml"):
        KeyFile(file)


@pytest.mark.parametrize("secret", ["", "blip2-secre", f"{SECRET} ", SECRET.upper(), "ü", "\0"])
def test_another_secret_finds_nothing(file: Path, secret: str) -> None:
    file.write_text(ENTRY)

    assert KeyFile(file).find(secret) is None


def test_an_empty_file_has_no_keys() -> None:
    assert parse("") == parse("# none yet\n") == ()


def replace(file: Path, text: str) -> None:
    """Like a secret of Kubernetes, which is another file afterwards."""
    new = file.with_suffix(".new")
    new.write_text(text)
    os.replace(new, file)


def test_a_changed_file_is_read_again_within_a_second(file: Path) -> None:
    clock = Clock()
    file.write_text(ENTRY)
    keys = KeyFile(file, clock)
    assert keys.find(SECRET)

    replace(file, ENTRY.replace(hash_of(SECRET), hash_of("other")))
    clock.now = 1.0
    assert not keys.find(SECRET)
    assert keys.find("other")


@pytest.mark.parametrize("text", ["- name: [", None])
def test_while_the_file_is_broken_or_gone_the_keys_stay(
    file: Path, text: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()
    file.write_text(ENTRY)
    keys = KeyFile(file, clock)
    if text is None:
        file.unlink()
    else:
        replace(file, text)
    with caplog.at_level(logging.ERROR):
        for clock.now in (1.0, 2.0):
            assert keys.find(SECRET)
    assert "stay as they were" in caplog.text
    assert SECRET not in caplog.text

    replace(file, ENTRY.replace("alice", "bob"))
    clock.now = 3.0
    found = keys.find(SECRET)
    assert found
    assert found.name == "bob"
