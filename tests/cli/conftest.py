"""Models, and ways to call ``kt``."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from cli.calling import CHAT_TEMPLATE, STORIES, Input, Kt, Outcome, edit_json
from kt_core.cli.main import run_cli


@pytest.fixture(scope="session", autouse=True)
def _quiet_and_single_threaded() -> None:
    """Do what ``kt`` does before it imports torch and transformers, which other tests imported."""
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the person's caches, colours, plug-ins and terminal out of it."""
    for name in ("CACHE", "STATE", "CONFIG"):
        monkeypatch.setenv(f"XDG_{name}_HOME", str(tmp_path / name.lower()))
    for name in ("KT_FORCE_ISA", "KT_BLOCK_PLUGINS", "FORCE_COLOR", "NO_COLOR", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_PROGRESS_BARS"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")
    monkeypatch.setenv("PROMPT_TOOLKIT_NO_CPR", "1")  # our terminal answers no questions


@pytest.fixture
def kt(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Kt:
    """Return a function that runs a command line in this process."""

    def call(*arguments: object, stdin: str | bytes | None = None) -> Outcome:
        data = stdin.encode() if isinstance(stdin, str) else stdin
        monkeypatch.setattr(sys, "stdin", Input(data))
        capsys.readouterr()
        code = run_cli([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Outcome(code=code, out=captured.out, err=captured.err)

    return call


@pytest.fixture
def kt_process(tmp_path: Path) -> Kt:
    """Return a function that runs a command line in a process of its own, through a shell.

    The command line is shell text in which ``kt`` is the program.
    """

    def call(script: str, *, python_path: str = "", **env: str) -> Outcome:
        program = tmp_path / "bin" / "kt"
        program.parent.mkdir(exist_ok=True)
        program.write_text(f'#!/bin/sh\nexec {sys.executable} -m kt_core.cli "$@"\n')
        program.chmod(0o755)
        path = os.pathsep.join([str(program.parent), os.environ["PATH"]])
        paths = os.pathsep.join(filter(None, [python_path, os.environ.get("PYTHONPATH", "")]))
        done = subprocess.run(
            ["bash", "-o", "pipefail", "-c", script],
            env={**os.environ, "PATH": path, "PYTHONPATH": paths, **env},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=120,
            check=False,
        )
        return Outcome(code=done.returncode, out=done.stdout.decode(), err=done.stderr.decode())

    return call


@pytest.fixture(scope="session")
def stories() -> Path:
    """Return the small trained model, which has no chat template."""
    return STORIES


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of the small trained model with a chat template."""
    directory = tmp_path_factory.mktemp("chat") / "stories"
    shutil.copytree(STORIES, directory)
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    edit_json(directory / "generation_config.json", eos_token_id=[0, 2])  # 2: <|im_end|>
    return directory


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Return a copy of the small trained model, to be spoilt."""
    return Path(shutil.copytree(STORIES, tmp_path / "model"))
