"""``kt doctor``, ``backends``, ``models``, ``plugins``, ``version``, and every ``--help``."""

from __future__ import annotations

import json
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from cli.calling import Kt
from cli.terminal import Terminal

COMMANDS = ("run", "doctor", "backends", "models", "plugins", "version")
INFO_COMMANDS = COMMANDS[1:]


def as_json(kt: Kt, command: str) -> Any:
    outcome = kt(command, "--json")
    assert outcome.err == ""
    return json.loads(outcome.succeeds())


# --- help --------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_help_explains_every_option_and_shows_examples(kt: Kt, command: str) -> None:
    text = kt(command, "--help").succeeds()
    assert f"Usage: kt {command}" in text
    assert f"kt {command}" in text.partition("Examples:")[2]
    for ugly in ("<bool>", "<str>", "<int>", "<float>", "list[", "{{", "[["):
        assert ugly not in text
    assert kt(command, "-h").out == text


def test_help_without_arguments(kt: Kt) -> None:
    everything = kt()
    assert everything.succeeds() == kt("--help").succeeds()
    for command in COMMANDS:
        assert command in everything.out
    assert "Exit codes: 0 done, 1 error, 2 wrong usage, 130 Ctrl-C" in everything.out


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_help_fits_the_terminal(kt: Kt, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    for arguments in (["--help"], ["run", "--help"]):
        lines = kt(*arguments).succeeds().splitlines()
        assert max(map(len, lines)) <= columns


def test_terminal_gets_colours_unless_it_says_no() -> None:
    for env, has_colour in (({"TERM": "xterm"}, True), ({"TERM": "xterm", "NO_COLOR": "1"}, False)):
        with Terminal(["run", "--help"], env, columns=60) as terminal:
            assert terminal.exit_code() == 0
        assert (b"\x1b[1;36m" in terminal.shown) is has_colour  # bold cyan: an option


# --- wrong usage -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["rnu"], ["no such command 'rnu'", "Did you mean 'run'?", "(see `kt --help`)"]),
        (["--fast"], ["no such option: --fast"]),
        (["run"], ["missing argument 'MODEL'", "(see `kt run --help`)"]),
        (["run", "m", "--fromat", "int4"], ["no such option: --fromat", "--format"]),
        (["run", "m", "--format"], ["'--format' requires an argument"]),
        (["run", "m", "x", "--temperature", "hot"], ["'--temperature'", "(see `kt run --help`)"]),
        (["run", "m", "x", "--temperature", "-1"], ["'--temperature'"]),
        (["run", "m", "x", "--temperature", "nan"], ["'--temperature'"]),
        (["run", "m", "x", "--top-p", "1.5"], ["'--top-p'"]),
        (["run", "m", "x", "--top-p", "0"], ["--top-p must be above 0"]),
        (["run", "m", "x", "--top-k", "-1"], ["'--top-k'"]),
        (["run", "m", "x", "--seed", "-1"], ["'--seed'"]),
        (["run", "m", "x", "--max-new-tokens", "0"], ["'--max-new-tokens'"]),
        (["run", "m", "x", "--threads", "0"], ["'--threads'"]),
        (["run", "m", "x", "--threads", "1000000"], ["'--threads'", "1024"]),
        (["run", "m", "x", "--threads", "many"], ["'--threads'"]),
        (["run", "m", "x", "--raw", "--system", "s"], ["--system", "--raw", "use one of them"]),
        (["run", "m", "--json"], ["--json needs a prompt", 'kt run MODEL "the prompt" --json']),
        (["run", "m", ""], ["the prompt is empty"]),
        (["doctor", "now"], ["unexpected extra argument", "now"]),
    ],
)
def test_wrong_usage(kt: Kt, arguments: list[str], parts: list[str]) -> None:
    kt(*arguments).fails(*parts, code=2)


# --- the commands ------------------------------------------------------------------------------


@pytest.mark.parametrize("command", INFO_COMMANDS)
def test_text_is_plain_in_a_pipe(kt: Kt, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "30")  # of a terminal that is not asked
    outcome = kt(command)
    assert "\x1b" not in outcome.succeeds()
    assert outcome.err == ""
    assert not any(line.endswith(" ") for line in outcome.out.splitlines())
    assert not any(line.startswith("  ") for line in outcome.out.splitlines())  # no wrapped row


def test_doctor(kt: Kt) -> None:
    report = as_json(kt, "doctor")
    assert report["cpu"]["usable_threads"] >= 1
    assert report["memory"]["available_bytes"] > 0
    (cpu,) = [backend for backend in report["backends"] if backend["name"] == "cpu"]
    assert cpu["available"] is True
    assert cpu["devices"][0]["isa"] in cpu["devices"][0]["isas"]
    assert cpu["devices"][0]["computes_dense"] is True
    assert report["versions"]["kt"] == version("kt-core")
    assert f"ready: cpu with {cpu['devices'][0]['isa']}" in kt("doctor").succeeds()


def test_doctor_shows_what_devices_remark(kt: Kt, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kt_cpu.backend._numa_remarks", lambda _: ("slow; do this",))
    (cpu,) = [b for b in as_json(kt, "doctor")["backends"] if b["name"] == "cpu"]
    assert cpu["devices"][0]["remarks"] == ["slow; do this"]
    assert re.search(r"^remark +cpu: slow; do this$", kt("doctor").succeeds(), re.MULTILINE)


def test_doctor_fails_where_nothing_can_run(kt: Kt, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KT_FORCE_ISA", "neon9")
    for arguments in (["doctor"], ["doctor", "--json"]):
        outcome = kt(*arguments)
        assert outcome.code == 1
        assert "KT_FORCE_ISA=neon9" in outcome.out
        assert outcome.err == "error: no backend can run here, so no model can\n"


def test_backends(kt: Kt, monkeypatch: pytest.MonkeyPatch) -> None:
    backends = {backend["name"]: backend for backend in as_json(kt, "backends")}
    cpu = backends["cpu"]
    assert (cpu["name"], cpu["plugin"], cpu["why_unavailable"]) == ("cpu", "cpu", None)
    # Nothing is compiled in this test's cache.
    assert "run `python -m kt_sim`" in backends["sim"]["why_unavailable"]
    assert {"bf16", "int8", "int4-g32"} <= set(cpu["devices"][0]["formats"])
    assert "int4-g32" in kt("backends").succeeds()

    monkeypatch.setenv("KT_FORCE_ISA", "neon9")
    assert all(backend["devices"] == [] for backend in as_json(kt, "backends"))
    assert "cannot run: KT_FORCE_ISA=neon9" in kt("backends").succeeds()


def test_models(kt: Kt, tmp_path: Path) -> None:
    (tmp_path / "cache/kt/models/made/").mkdir(parents=True)
    (tmp_path / "cache/kt/models/made/config.json").write_text('{"model_type": "qwen3_moe"}')
    (tmp_path / "cache/kt/models/half/").mkdir()
    (tmp_path / "cache/kt/models/half/config.json").write_text('{"model_ty')
    report = as_json(kt, "models")
    statuses = {family["model_type"]: family["status"] for family in report["families"]}
    assert len(statuses) == len(report["families"])
    assert statuses["qwen3_moe"] == "matches"
    assert "demo" in [model["name"] for model in report["named"]]
    (local,) = report["local"]
    assert local == {
        "path": str(tmp_path / "cache/kt/models/made"),
        "model_type": "qwen3_moe",
        "size_bytes": 27,
    }
    text = kt("models").succeeds()
    assert str(local["path"]) in text
    assert any(line.split() == ["qwen3_moe", "matches"] for line in text.splitlines())


def test_plugins(kt: Kt, monkeypatch: pytest.MonkeyPatch) -> None:
    report = as_json(kt, "plugins")
    by_name = {plugin["name"]: plugin for plugin in report["plugins"]}
    assert by_name["cpu"]["module"] == "kt_cpu"
    assert by_name["cpu"]["registered"]["backends"] == ["cpu"]
    assert by_name["demo"]["registered"]["models"] == ["demo"]
    assert report["blocked"] == []

    monkeypatch.setenv("KT_BLOCK_PLUGINS", "demo")
    report = as_json(kt, "plugins")
    assert "demo" not in [plugin["name"] for plugin in report["plugins"]]
    assert report["blocked"] == ["demo"]
    assert "nothing: KT_BLOCK_PLUGINS blocks it" in kt("plugins").succeeds()


def test_version(kt: Kt) -> None:
    versions = as_json(kt, "version")
    assert versions["kt"] == version("kt-core")
    assert {"python", "torch", "transformers"} <= set(versions)
    assert kt("version").succeeds().split()[:2] == ["kt", versions["kt"]]
    assert kt("--version").succeeds() == f"kt {versions['kt']}\n"
