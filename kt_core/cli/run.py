"""``kt run``: answer one prompt, or chat."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

import typer

from kt_core.cli import run_options as option
from kt_core.cli.answer import answer, answer_json
from kt_core.cli.output import progress_bar, registry_of
from kt_core.cli.profile import check_target, profiled
from kt_core.errors import InvalidRequestError

if TYPE_CHECKING:
    from kt_core.engine import Engine

EPILOG = """
Examples:

* `kt run demo "What is the capital of France?" --temperature 0`
* `kt run ./Qwen3-30B-A3B --format int4` starts a chat
* `kt run ./Qwen3-30B-A3B --format int4 --dense-format int8` packs all large layers
* `kt run ./Qwen3-30B-A3B --format int4 --device cuda --hot-experts 25%` shares the work
* `kt run ./Qwen3-30B-A3B --format int4 --cache` starts faster the next time
* `kt run demo < question.txt`
* `kt run ./Qwen3-30B-A3B --device cuda --profile run.json` shows who waited for whom
* `kt run demo "Say hello" --json | jq .decode_tokens_per_s`
"""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(epilog=EPILOG)(run)


def run(
    context: typer.Context,
    model: option.Model,
    prompt: option.Prompt = None,
    *,
    weight_format: option.Format = "auto",
    device: option.Device = "auto",
    hot_experts: option.HotExperts = "auto",
    placement: option.Placement = "adaptive",
    accelerator_memory: option.AcceleratorMemory = None,
    defer: option.Defer = 0,
    graph: option.Graph = True,
    dense_format: option.DenseFormat = "none",
    cache: option.Cache = False,
    threads: option.Threads = None,
    max_new_tokens: option.MaxNewTokens = 512,
    temperature: option.Temperature = 0.7,
    top_p: option.TopP = 0.95,
    top_k: option.TopK = 0,
    seed: option.Seed = None,
    stop: option.Stop = None,
    system: option.System = None,
    raw: option.Raw = False,
    as_json: option.AsJson = False,
    profile: option.Profile = None,
    verbose: option.Verbose = False,
) -> None:
    """Answer a prompt, or chat with a model.

    The answer goes to stdout, statistics go to stderr. Exits with 1 after an error, 130 after
    Ctrl-C.
    """
    if raw and system:
        msg = "--system is a message of the chat template, which --raw turns off: use one of them"
        raise InvalidRequestError(msg)
    if top_p == 0:
        msg = "--top-p must be above 0 (--temperature 0 always takes the likeliest token)"
        raise InvalidRequestError(msg)
    text = _prompt_text(" ".join(prompt) if prompt else None, raw=raw)
    if text is None and as_json:
        msg = '--json needs a prompt: kt run MODEL "the prompt" --json, or pipe it in'
        raise InvalidRequestError(msg)
    check_target(profile)
    options: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "seed": seed,
        "stop": tuple(stop or ()),
    }
    where = {
        "format": weight_format,
        "device": device,
        "hot_experts": hot_experts,
        "placement": placement,
        "accelerator_memory": _bytes(accelerator_memory),
        "defer": defer,
        "graph": graph,
        "threads": threads,
        "dense_format": dense_format,
        "cache": cache,
    }
    if not verbose:
        silence_transformers()
    with _load(context, model, where) as engine:
        if text is None:
            from kt_core.cli.chat import chat

            with profiled(engine, profile):
                chat(engine, system=system, raw=raw, options=options)
        else:
            messages = _with_system(text, system)
            tell = answer_json if as_json else answer
            tell(engine, messages, raw=raw, options=options, profile=profile)


def _bytes(size: str | None) -> int | None:
    if size is None:
        return None
    from kt_core.plan.units import parse_bytes

    return parse_bytes(size, "--accelerator-memory")


def _prompt_text(prompt: str | None, *, raw: bool) -> str | None:
    """Return what was given or is piped in; None for a chat.

    Raises:
        InvalidRequestError: There is no text, or something else than text.
    """
    if prompt is None:
        if sys.stdin is None:
            msg = "stdin is closed, so there is no prompt: give one on the command line"
            raise InvalidRequestError(msg)
        if sys.stdin.isatty():
            return None
    try:
        if prompt is None:
            prompt = sys.stdin.buffer.read().decode().removesuffix("\n")
        else:
            prompt.encode()
    except UnicodeError as error:
        msg = f"the prompt is not UTF-8 text ({error}); convert it first, for instance with iconv"
        raise InvalidRequestError(msg) from error
    if not (prompt if raw else prompt.strip()):
        msg = "the prompt is empty: write one, pipe one in, or leave both out on a terminal to chat"
        raise InvalidRequestError(msg)
    return prompt


def _with_system(prompt: str, system: str | None) -> str | list[dict[str, str]]:
    if not system:
        return prompt
    return [{"role": "system", "content": system}, {"role": "user", "content": prompt}]


def silence_transformers() -> None:
    """Leave the talking to us. Read once, when transformers is imported: so before that."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def _load(context: typer.Context, model: str, where: dict[str, Any]) -> Engine:
    with progress_bar("starting") as progress:
        from kt_core.engine import load  # seconds: torch and transformers

        return load(model, **where, registry=registry_of(context), progress=progress)
