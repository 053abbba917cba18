"""What happens before a command runs: imports, plug-ins, streams, completion."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from cli.calling import Kt

BLOCKED_HINT = "start without it: KT_BLOCK_PLUGINS=broken"


def test_light_commands_import_no_heavy_package() -> None:
    script = """
    import contextlib, io, json, sys
    from kt_core.cli.main import run_cli
    for line in ("--help", "run --help", "version", "version --json", "plugins", "run", "rnu"):
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            run_cli(line.split())
    heavy = {"huggingface_hub", "numpy", "prompt_toolkit", "safetensors", "torch", "transformers"}
    print(json.dumps(sorted(heavy & set(sys.modules))))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, check=True
    )
    assert json.loads(done.stdout) == []


# --- plug-ins ----------------------------------------------------------------------------------


def install(folder: Path, name: str, source: str) -> str:
    """Make a distribution with one plug-in; return what PYTHONPATH needs."""
    module = f"{name}_plugin"
    (folder / f"{module}.py").write_text(textwrap.dedent(source), encoding="utf-8")
    metadata = folder / f"{name}-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(f"[kt]\n{name} = {module}\n")
    return str(folder)


def test_plugin_that_fails_to_import(kt_process: Kt, tmp_path: Path) -> None:
    path = install(tmp_path, "broken", "import kt_no_such_module\n")
    for command in ("version", "--help", "run"):
        outcome = kt_process(f"kt {command}", python_path=path)
        assert (outcome.code, outcome.out) == (1, "")
        *traceback, error = outcome.err.splitlines()
        assert traceback[0] == "Traceback (most recent call last):"
        assert any("broken_plugin.py" in line for line in traceback)
        assert traceback[-1] == "ModuleNotFoundError: No module named 'kt_no_such_module'"
        assert error.startswith("error: plug-in 'broken' (broken_plugin) failed to import")
        assert BLOCKED_HINT in error

    followed = kt_process("kt plugins", python_path=path, KT_BLOCK_PLUGINS="broken")
    assert "broken" in followed.succeeds()


def test_misspelt_hook(kt_process: Kt, tmp_path: Path) -> None:
    source = """
    from kt_core.hookspecs import hookimpl

    @hookimpl
    def kt_register_bakcends(register):
        pass
    """
    path = install(tmp_path, "misspelt", source)
    message = kt_process("kt version", python_path=path).fails("'misspelt'", "kt_register_bakcends")
    assert "kt_core.hookspecs" in message
    kt_process("kt version", python_path=path, KT_BLOCK_PLUGINS="misspelt").succeeds()


def test_name_that_is_taken(kt_process: Kt, tmp_path: Path) -> None:
    source = """
    from kt_core.hookspecs import hookimpl
    from kt_cpu import CpuBackend

    @hookimpl
    def kt_register_backends(register):
        register(CpuBackend())
    """
    path = install(tmp_path, "second", source)
    outcome = kt_process("kt version", python_path=path)
    outcome.fails("backend 'cpu' is registered twice", "by cpu and by second", "KT_BLOCK_PLUGINS")
    kt_process("kt version", python_path=path, KT_BLOCK_PLUGINS="second").succeeds()


def test_blocking_a_plugin_that_is_not_there(kt: Kt, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KT_BLOCK_PLUGINS", "demo,dmeo")
    message = kt("version").fails("KT_BLOCK_PLUGINS", "'dmeo'", "Installed: checkpoints, cpu, cuda")
    assert "'demo'" not in message


def test_plugin_command_looks_like_ours(kt_process: Kt, tmp_path: Path) -> None:
    source = """
    from typing import Annotated

    import typer
    from kt_core.errors import KtError
    from kt_core.hookspecs import hookimpl

    @hookimpl
    def kt_register_commands(app):
        @app.command()
        def greet(loudly: Annotated[bool, typer.Option("--loudly", help="Shout.")] = False) -> None:
            "Say hello."
            if loudly:
                raise KtError("the neighbours sleep; leave out --loudly")
            typer.echo("hello")
    """
    path = install(tmp_path, "greeter", source)
    assert kt_process("kt greet", python_path=path).succeeds() == "hello\n"
    kt_process("kt greet --loudly", python_path=path).fails("the neighbours sleep")
    assert "<bool>" not in kt_process("kt greet --help", python_path=path).succeeds()
    assert "greet" in kt_process("kt --help", python_path=path).succeeds()


# --- streams -----------------------------------------------------------------------------------


def test_closed_stdout(kt_process: Kt) -> None:
    kt_process("kt version >&-").fails("stdout is closed", ">/dev/null")
    kt_process("kt version >/dev/null").succeeds()


def test_full_disk(kt_process: Kt) -> None:
    for command in ("version", "version --json", "--version"):
        kt_process(f"kt {command} >/dev/full").fails("No space left on device")


def test_closed_stdin_and_stderr(kt_process: Kt) -> None:
    kt_process("kt run nothing <&-").fails("stdin is closed", "command line", code=2)
    assert kt_process("kt version 2>&-").succeeds().startswith("kt ")
    assert kt_process("kt rnu 2>&-").code == 2


def test_reader_that_leaves_a_table(kt_process: Kt) -> None:
    outcome = kt_process("kt plugins | head -c 1")
    assert (outcome.out, "Traceback" in outcome.err) == ("p", False)


def test_output_that_cannot_show_every_character(kt_process: Kt, tmp_path: Path) -> None:
    source = """
    from kt_core.hookspecs import hookimpl

    @hookimpl
    def kt_register_commands(app):
        app.command(help="Größe 🦊")(lambda: None)
    """
    path = install(tmp_path, "vocabulary", source)
    outcome = kt_process("kt --help", python_path=path, PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert "Gr??e ?" in outcome.succeeds()


@pytest.mark.parametrize("prompt", [b"\xff\xfe", b"caf\xe9"])
def test_prompt_that_is_no_text(kt: Kt, prompt: bytes) -> None:
    kt("run", "nothing", stdin=prompt).fails("not UTF-8", "iconv", code=2)
    kt("run", "nothing", prompt.decode(errors="surrogateescape")).fails("not UTF-8", code=2)


@pytest.mark.parametrize("prompt", ["", "\n", "  \n \n"])
def test_empty_stdin(kt: Kt, prompt: str) -> None:
    kt("run", "nothing", stdin=prompt).fails("the prompt is empty", code=2)


# --- completion --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("kt ver", ["verify", "version"]),
        ("kt run de", ["demo"]),
        ("kt run demo --format int8-g3", ["int8-g32", "int8-g32-f16", "int8-g32-f32"]),
        ("kt run demo --temp", ["--temperature"]),
    ],
)
def test_completion_in_bash(kt_process: Kt, typed: str, expected: list[str]) -> None:
    outcome = kt_process(
        "kt",
        _KT_COMPLETE="complete_bash",
        COMP_WORDS=typed,
        COMP_CWORD=str(len(typed.split()) - 1),
    )
    assert outcome.succeeds().split() == expected


def test_completion_of_devices(kt: Kt) -> None:
    from typer.core import TyperGroup
    from typer.main import get_command

    from kt_core import plugins
    from kt_core.cli.main import build_app

    registry = plugins.load()
    group = get_command(build_app(registry))
    assert isinstance(group, TyperGroup)
    context = group.make_context("kt", ["version"])
    (device,) = [p for p in group.commands["run"].params if p.name == "device"]
    assert [item.value for item in device.shell_complete(context, "")] == ["auto", "cpu"]
    assert [item.value for item in device.shell_complete(context, "c")] == ["cpu"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(kt_process: Kt, shell: str) -> None:
    script = kt_process("kt", _KT_COMPLETE=f"source_{shell}").succeeds()
    assert f"complete_{shell}" in script


def test_show_completion_recognises_the_shell(kt_process: Kt) -> None:
    assert "complete -o default -F" in kt_process("kt --show-completion; :").succeeds()
