"""``kt run`` with a prompt: what is printed where, and what each option does."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cli.calling import Kt, edit_json
from cli.terminal import CTRL_C, Terminal

GREEDY = ("--temperature", "0", "--max-new-tokens", "12", "--threads", "1")
# Shells show 130 for both. Python ends itself by the signal where Ctrl-C hit code run by exec().
INTERRUPTED = (130, -signal.SIGINT)
JSON_KEYS = {
    "text": str,
    "token_ids": list,
    "prefill_tokens_per_s": float,
    "decode_tokens_per_s": float,
    "ttft_s": float,
    "load_s": float,
    "peak_memory_bytes": int,
    "format": str,
    "isa": str,
    "placement": dict,
}


def test_answer_goes_to_stdout_and_statistics_to_stderr(kt: Kt, stories: Path) -> None:
    answer = kt("run", stories, "Once upon a time", *GREEDY)

    assert answer.succeeds().startswith(", there was a ")
    assert answer.out.endswith("\n")
    assert "\x1b" not in answer.out + answer.err
    (cut, statistics) = answer.err.splitlines()
    assert cut == "(cut after 12 tokens: --max-new-tokens allows more)"
    assert re.fullmatch(
        r"4 prompt tokens at [\d.]+/s, 12 new at [\d.]+/s, first after [\d.]+ s; "
        r"loaded in [\d.]+ s as bf16 on cpu \(\w+, \d+ threads\), peak [\d.]+ GB",
        statistics,
    )


def test_one_token_has_no_decode_speed(kt: Kt, stories: Path) -> None:
    answer = kt("run", stories, "Once upon a time", "--max-new-tokens", "1", "--threads", "1")
    assert ", 1 new, first after" in answer.err


def test_json(kt: Kt, stories: Path) -> None:
    answer = kt("run", stories, "Once upon a time", *GREEDY, "--json", "--format", "int8")
    report = json.loads(answer.succeeds())

    assert {key: type(report[key]) for key in JSON_KEYS} == JSON_KEYS
    assert report["format"] == "int8"
    assert len(report["token_ids"]) == report["new_tokens"] == 12
    assert report["finish_reason"] == "length"
    assert report["decode"]["why_eager"] == "there is no accelerator"
    assert answer.err == ""  # the statistics are in the JSON


def test_dense_format(kt: Kt, stories: Path) -> None:
    """bf16 holds the weights of this model exactly: the same answer, computed by other code."""
    plain = kt("run", stories, "Once upon a time", *GREEDY)
    packed = kt("run", stories, "Once upon a time", *GREEDY, "--dense-format", "bf16")
    assert packed.succeeds() == plain.succeeds()
    assert "as bf16, dense layers as bf16, on cpu" in packed.err
    reports = [
        json.loads(kt("run", stories, "Once", *GREEDY, "--json", "--dense-format", name).succeeds())
        for name in ("none", "int8")
    ]
    assert [report["dense_format"] for report in reports] == ["none", "int8"]
    assert reports[0]["dense_layers"] == 0 < reports[1]["dense_layers"]
    assert reports[1]["dense_bytes"] < reports[0]["dense_bytes"]


def test_same_answer_in_json_and_as_text(kt: Kt, stories: Path) -> None:
    text = kt("run", stories, "Once upon a time", *GREEDY).succeeds()
    report = json.loads(kt("run", stories, "Once upon a time", *GREEDY, "--json").succeeds())
    assert text == report["text"] + "\n"


def test_seed(kt: Kt, stories: Path) -> None:
    def draw(*options: str) -> str:
        length = ("--max-new-tokens", "12", "--temperature", "1.5", "--threads", "1")
        return kt("run", stories, "Once upon a time", *length, *options).succeeds()

    assert draw("--seed", "7") == draw("--seed", "7")
    assert draw("--seed", "7") != draw("--seed", "8")


def test_stop_texts(kt: Kt, stories: Path) -> None:
    answer = kt("run", stories, "Once upon a time", *GREEDY, "--stop", "xyzzy", "--stop", "there")
    assert answer.succeeds() == ", \n"
    assert "(cut" not in answer.err


def test_words_without_quotes_are_one_prompt(kt: Kt, stories: Path) -> None:
    quoted = kt("run", stories, "Once upon a time", *GREEDY).succeeds()
    assert kt("run", stories, *GREEDY, "Once", "upon", "a", "time").succeeds() == quoted


def test_piped_prompt(kt: Kt, stories: Path) -> None:
    given = kt("run", stories, "Once upon a time", *GREEDY).succeeds()
    assert kt("run", stories, *GREEDY, stdin="Once upon a time\n").succeeds() == given


def test_given_prompt_leaves_stdin_unread(kt: Kt, stories: Path) -> None:
    given = kt("run", stories, "Once upon a time", *GREEDY).succeeds()
    assert kt("run", stories, "Once upon a time", *GREEDY, stdin="ignored").succeeds() == given


def test_chat_template_system_message_and_raw(kt: Kt, chat_model: Path) -> None:
    def prompt_tokens(*options: str) -> int:
        arguments = ("--max-new-tokens", "1", "--threads", "1", "--json", *options)
        answer = kt("run", chat_model, "Hello there", *arguments)
        return int(json.loads(answer.succeeds())["prompt_tokens"])

    raw, chat = prompt_tokens("--raw"), prompt_tokens()
    assert raw < chat < prompt_tokens("--system", "Be brief.")


def test_answer_that_the_model_ends_itself(kt: Kt, chat_model: Path) -> None:
    prompt = "Tell me a story about a fox and a book."
    answer = kt("run", chat_model, prompt, "--temperature", "0", "--threads", "1")
    assert answer.succeeds().startswith("There once was")
    assert "(cut" not in answer.err
    assert "<|im_end|>" not in answer.out


def test_full_context_ends_the_answer(kt: Kt, model: Path) -> None:
    edit_json(model / "config.json", max_position_embeddings=16)
    answer = kt("run", model, "Once upon a time", "--temperature", "0", "--threads", "1")
    answer.succeeds()
    assert answer.err.startswith("(cut: the model's context is full)\n")


def test_prompt_beyond_ascii(kt: Kt, stories: Path) -> None:
    kt("run", stories, "Ünïcödé 🦊 狐", *GREEDY).succeeds()


# --- in a process of its own -------------------------------------------------------------------


def test_reader_that_leaves(kt_process: Kt, stories: Path) -> None:
    outcome = kt_process(f"kt run {stories} 'Once upon a time' --temperature 0 | head -c 1")
    assert outcome.out == ","
    assert outcome.code == 1
    assert outcome.err == (
        "error: not everything was written: whoever reads the output takes no more (Broken pipe)\n"
    )


def test_terminal_shows_progress_and_cleans_it_up(stories: Path) -> None:
    arguments = ["run", str(stories), "Once upon a time", *GREEDY]
    with Terminal(arguments, {"TERM": "xterm"}) as terminal:
        terminal.expect("dense weights")
        terminal.expect("reading the prompt")
        assert terminal.exit_code() == 0
    erase_line = b"\x1b[2K"
    last_progress, _, rest = terminal.shown.rpartition(b"reading the prompt")
    assert erase_line in last_progress
    before_answer, _, _ = rest.partition(b", there was a")
    assert before_answer.endswith(erase_line)


@pytest.mark.parametrize("stage", ["starting", "dense weights"])
def test_ctrl_c_while_loading(stories: Path, stage: str) -> None:
    """First while torch is being imported, then while weights are being read."""
    arguments = ["run", str(stories), "Once upon a time", "--max-new-tokens", "2000"]
    with Terminal(arguments, {"TERM": "xterm"}) as terminal:
        terminal.expect(stage)
        terminal.type(CTRL_C)
        terminal.expect("interrupted")
        assert terminal.exit_code() in INTERRUPTED
    assert b"Traceback" not in terminal.shown


def test_ctrl_c_while_answering(stories: Path) -> None:
    command = [sys.executable, "-m", "kt_core.cli", "run", str(stories), "Once upon a time"]
    options = ("--temperature", "0", "--max-new-tokens", "2000")
    pipe = subprocess.PIPE
    with subprocess.Popen([*command, *options], stdout=pipe, stderr=pipe) as running:
        assert running.stdout is not None
        ready, _, _ = select.select([running.stdout], [], [], 60)
        assert ready
        begun = os.read(running.stdout.fileno(), 100)
        running.send_signal(signal.SIGINT)
        out, err = running.communicate(timeout=60)
    assert err.decode() == "interrupted\n"
    assert running.returncode in INTERRUPTED
    assert (begun + out).endswith(b"\n")  # the shell's prompt starts on a line of its own
