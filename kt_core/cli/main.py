"""Put the commands together, and turn what goes wrong into one line and an exit code."""

from __future__ import annotations

import io
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, Any

import pluggy
import typer

from kt_core import __version__, plugins
from kt_core.cli import (
    backends,
    bench,
    cache,
    doctor,
    models,
    place,
    plan,
    quant,
    run,
    trace,
    verify,
    version,
)
from kt_core.cli import plugins as plugins_command
from kt_core.cli.app import App
from kt_core.cli.output import LogHandler, complain, remark, write
from kt_core.errors import InvalidRequestError, KtError, PluginError

EXIT_FAILURE = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it

HELP = """
Run Mixture-of-Experts language models that do not fit on the accelerator.

Exit codes: 0 done, 1 error, 2 wrong usage, 130 Ctrl-C.
"""
EPILOG = """
Examples:

* `kt run demo "What is the capital of France?"` answers one question
* `kt run demo` starts a chat
* `kt plan deepseek-v3` says what a model takes on this machine, and how fast it will be
* `kt quant ./Qwen3-30B-A3B ./qwen3-int4 --format int4` packs a model once, so that it starts fast
* `kt doctor` says what can run on this machine
"""


def build_app(registry: plugins.Registry) -> App:
    """Return the application; the plug-ins' commands come after our own."""
    app = App(
        name="kt",
        help=HELP,
        epilog=EPILOG,
        pretty_exceptions_enable=False,
        rich_markup_mode="markdown",
        context_settings={"obj": registry, "help_option_names": ["-h", "--help"]},
    )
    app.callback()(_root)
    commands = (
        run, plan, quant, verify, cache, bench, trace, place, doctor, backends, models,
        plugins_command, version,
    )  # fmt: skip
    for command in commands:
        command.register(app)
    registry.add_commands(app)
    return app


def _show_version(is_asked: bool) -> None:
    if is_asked:
        write(f"kt {__version__}\n")
        raise typer.Exit


def _root(
    _version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    pass  # the commands do the work


def main() -> None:
    """Run ``kt`` on this process' arguments and exit."""
    # Idle OpenMP threads of torch spin by default, on the cores where the experts are computed; on
    # a busy machine every small dense layer then waits for a time slice: 0.5 instead of 14 tokens/s
    # on 2 cores under load 6. Read once, when torch is imported: so here, before that.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    logging.basicConfig(level=logging.WARNING, handlers=[LogHandler()])
    _mend_streams()
    sys.exit(run_cli(sys.argv[1:]))


def _mend_streams() -> None:
    """Survive closed streams and terminals that cannot show every character."""
    for descriptor in range(3):  # else the next file opened would be taken for stdout
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number: this one
    if sys.stdout is None:
        complain("error", "stdout is closed, so nothing can be printed; open it, or use >/dev/null")
        sys.exit(EXIT_FAILURE)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def run_cli(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code; what went wrong is told on stderr."""
    result: Any = 0
    try:
        app = build_app(plugins.load())
        result = app([*arguments] or ["--help"], prog_name="kt", standalone_mode=False)
    except KtError as error:
        _show_cause(error)
        complain("error", str(error))
        return EXIT_USAGE if isinstance(error, InvalidRequestError) else EXIT_FAILURE
    except typer.TyperException as error:
        return _wrong_usage(error)
    except OSError as error:
        complain("error", str(error))
        return EXIT_FAILURE
    except (KeyboardInterrupt, typer.Abort):
        result = EXIT_INTERRUPTED
    if result == EXIT_INTERRUPTED:
        remark("interrupted")
    return result if isinstance(result, int) else 0


def _show_cause(error: KtError) -> None:
    """Print the traceback of a plug-in that failed: only its author can read more out of it."""
    cause = error.__cause__
    if not isinstance(error, PluginError) or cause is None:
        return
    if not isinstance(cause, pluggy.PluginValidationError):  # a misspelt hook: the message says it
        traceback.print_exception(cause)


def _wrong_usage(error: typer.TyperException) -> int:
    message = error.format_message().rstrip(".")
    context = getattr(error, "ctx", None)
    command = context.command_path if context else "kt"
    complain("error", f"{message[:1].lower()}{message[1:]} (see `{command} --help`)")
    return error.exit_code
