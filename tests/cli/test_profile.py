"""``kt run --profile`` on the host; tests/sim/test_timeline.py has what accelerators add."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cli.calling import Kt

GREEDY = ("--temperature", "0", "--max-new-tokens", "4", "--threads", "1", "--device", "cpu")
# Shells show 130 for both. Python ends itself by the signal where Ctrl-C hit code run by exec().
INTERRUPTED = (130, -signal.SIGINT)


def spans(file: Path, category: str) -> list[dict[str, Any]]:
    trace = json.loads(file.read_text(encoding="utf-8"))
    return [event for event in trace["traceEvents"] if event.get("cat") == category]


def test_steps_and_layers(kt: Kt, stories: Path, tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    plain = kt("run", stories, "Once upon a time", *GREEDY).succeeds()
    answer = kt("run", stories, "Once upon a time", *GREEDY, "--profile", file)
    assert answer.succeeds() == plain
    assert f"{file}: open it in" in answer.err
    steps = [*spans(file, "prefill"), *spans(file, "decode")]
    assert [step["name"] for step in steps] == ["prefill of 4 tokens", *["decode"] * 3]
    assert len(spans(file, "layer")) == len(steps) * 4
    assert not list(tmp_path.glob(".run*"))


def test_an_older_file_is_replaced(kt: Kt, stories: Path, tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    file.write_text("something else")
    kt("run", stories, "Once", *GREEDY, "--profile", file).succeeds()
    assert spans(file, "decode")


@pytest.mark.parametrize("name", ["absent/run.json", "."])
def test_where_it_cannot_be(kt: Kt, tmp_path: Path, name: str) -> None:
    """Said before anything is looked for."""
    answer = kt("run", "no-such-model", "Once", "--profile", tmp_path / name)
    assert answer.code == 2
    assert answer.err.startswith("error: --profile ")


def test_ctrl_c_leaves_what_there_is(stories: Path, tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    command = [sys.executable, "-m", "kt_core.cli", "run", str(stories), "Once upon a time"]
    options = ("--temperature", "0", "--max-new-tokens", "2000", "--profile", str(file))
    pipe = subprocess.PIPE
    with subprocess.Popen([*command, *options], stdout=pipe, stderr=pipe) as running:
        assert running.stdout is not None
        ready, _, _ = select.select([running.stdout], [], [], 60)
        assert ready
        begun = os.read(running.stdout.fileno(), 100)
        running.send_signal(signal.SIGINT)
        _, err = running.communicate(timeout=60)
    assert begun
    assert running.returncode in INTERRUPTED
    assert err.decode().endswith("interrupted\n")
    assert spans(file, "prefill")
    assert not list(tmp_path.glob(".run*"))
