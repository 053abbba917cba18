"""The chat: in a real terminal once, and its parts one by one."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input

import kt_core
from cli.calling import Kt
from cli.terminal import ALT_ENTER, CTRL_C, CTRL_D, ENTER, Terminal, paste
from kt_core.cli import chat as chat_module
from kt_core.cli.chat import Chat
from kt_core.errors import ContextLengthError, KtError, TokenizerError

OPTIONS = {"temperature": 0.0, "max_new_tokens": 8}
STORY = "Tell me a story about a fox and a book."


def test_a_conversation_at_a_terminal(chat_model: Path, tmp_path: Path) -> None:
    endless = tmp_path / "endless"
    endless.mkdir()
    for file in chat_model.iterdir():
        (endless / file.name).symlink_to(file)
    (endless / "generation_config.json").unlink()
    (endless / "generation_config.json").write_text('{"eos_token_id": 1023}')
    arguments = ["run", str(endless), "--temperature", "0", "--max-new-tokens", "1500"]

    with Terminal(arguments, {"TERM": "xterm"}) as terminal:

        def press(keys: str, answer: str) -> None:
            terminal.expect_prompt()
            terminal.type(keys)
            terminal.expect(answer)

        def enter(text: str, answer: str) -> None:
            press(text + ENTER, answer)

        terminal.expect("/help lists the commands")
        enter("/help", "Alt-Enter")
        enter("/dance", "there is no /dance; /help lists what there is")

        enter(paste("Tell me a story\nabout a fox."), "There once was")
        terminal.type(CTRL_C)
        terminal.expect("(stopped)")
        enter("Tell me" + ALT_ENTER + "more.", "reading the prompt")  # the chat goes on
        terminal.expect("once was")
        terminal.type(CTRL_C)
        terminal.expect("(stopped)")

        enter(paste("fox " * 2500), "error: the prompt has ")
        terminal.expect("the model's context holds 2048")
        terminal.expect("start anew with /clear")
        enter("/clear", "forgotten")
        enter("/stats", "qwen3_moe, 0.01 GB of weights; loaded in")

        press(CTRL_C, "Ctrl-C once more leaves")
        enter("/clear", "forgotten")  # so the next one is the first again
        press(CTRL_C, "Ctrl-C once more leaves")
        terminal.expect_prompt()
        terminal.type(CTRL_C)
        assert terminal.exit_code() == 0
    assert b"Traceback" not in terminal.shown

    history = tmp_path / "state" / "kt" / "chat_history"
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    assert stat.S_IMODE(history.parent.stat().st_mode) == 0o700
    assert "+Tell me a story\n+about a fox.\n" in history.read_text(encoding="utf-8")
    assert "+Tell me\n+more.\n" in history.read_text(encoding="utf-8")


# --- through a pipe that stands for the keyboard -------------------------------------------------


@pytest.mark.parametrize("keys", ["/exit\r", "/quit\r", CTRL_D, CTRL_C + CTRL_C, "\r /exit \r"])
def test_ways_to_leave(kt: Kt, chat_model: Path, keys: str) -> None:
    with create_pipe_input() as keyboard, create_app_session(input=keyboard):
        keyboard.send_text(keys)
        assert kt("run", chat_model, "--threads", "1").code == 0


def test_model_without_template_says_so_before_anything_is_typed(kt: Kt, stories: Path) -> None:
    with create_pipe_input() as keyboard, create_app_session(input=keyboard):
        kt("run", stories, "--threads", "1").fails("no chat template", "--raw")
        keyboard.send_text("Once upon a time\r/exit\r")  # what the message advises
        outcome = kt("run", stories, "--raw", "--threads", "1", "--temperature", "0")
    assert ", there was a" in outcome.succeeds()


def test_home_that_cannot_be_written(
    kt: Kt, chat_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    with create_pipe_input() as keyboard, create_app_session(input=keyboard):
        keyboard.send_text("/help\r/exit\r")
        assert kt("run", chat_model, "--threads", "1").code == 0


# --- the conversation ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engine(chat_model: Path) -> Iterator[kt_core.Engine]:
    with kt_core.load(chat_model, threads=1) as engine:
        yield engine


def roles(chat: Chat) -> list[str]:
    return [message["role"] for message in chat.messages]


def new_chat(engine: Any, *, system: str | None = None, raw: bool = False) -> Chat:
    return Chat(engine, system=system, raw=raw, options=dict(OPTIONS))


def test_turns_are_remembered(engine: kt_core.Engine, capsys: pytest.CaptureFixture[str]) -> None:
    chat = new_chat(engine, system="Be brief.")
    assert chat.handle(STORY)
    assert chat.handle("And then?")
    assert roles(chat) == ["system", "user", "assistant", "user", "assistant"]
    shown = capsys.readouterr()
    assert [m["content"] + "\n" for m in chat.messages[2::2]] == shown.out.splitlines(keepends=True)
    assert "(cut after 8 tokens: --max-new-tokens allows more)" in shown.err


def test_clear_keeps_the_system_message(engine: kt_core.Engine) -> None:
    chat = new_chat(engine, system="Be brief.")
    chat.handle(STORY)
    chat.handle("/clear")
    assert chat.messages == [{"role": "system", "content": "Be brief."}]


def test_raw_text_has_no_past(engine: kt_core.Engine, capsys: pytest.CaptureFixture[str]) -> None:
    chat = new_chat(engine, raw=True)
    chat.handle("Once upon a time")
    chat.handle("Once upon a time")
    first, second = capsys.readouterr().out.splitlines()
    assert first == second
    assert chat.messages == []


def test_stats_of_the_last_answer(
    engine: kt_core.Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    chat = new_chat(engine)
    chat.handle("/stats")
    assert "last answer" not in capsys.readouterr().err
    chat.handle(STORY)
    chat.handle("/stats")
    assert "last answer: " in capsys.readouterr().err


def test_slashes_that_are_no_commands_are_messages(engine: kt_core.Engine) -> None:
    chat = new_chat(engine)
    for line in ("/etc/hosts is what?", "what is /exit", "   "):
        assert chat.handle(line)
    assert roles(chat) == 2 * ["user", "assistant"]


def test_context_that_is_full_loses_nothing(
    engine: kt_core.Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    chat = new_chat(engine)
    chat.handle(STORY)
    before = list(chat.messages)
    capsys.readouterr()
    chat.handle("fox " * 3000)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: the prompt has ")
    assert "start anew with /clear" in shown.err
    assert chat.messages == before
    chat.handle("And then?")
    assert roles(chat) == ["user", "assistant", "user", "assistant"]


def test_stopped_answer_stays_as_far_as_it_came(
    engine: kt_core.Engine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    written: list[str] = []

    def write(text: str) -> None:
        written.append(text)
        if len(written) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(chat_module, "write", write)
    chat = new_chat(engine)
    chat.handle(STORY)
    assert capsys.readouterr().err == "(stopped)\n"
    assert written[-1] == "\n"
    assert chat.messages[1]["content"] == "".join(written[:3])


def test_stopped_before_the_first_token_forgets_the_question(
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Slow:
        def stream(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
            del args, kwargs
            raise KeyboardInterrupt

    chat = new_chat(Slow())
    assert chat.handle("A long question")
    assert chat.messages == []
    assert "(stopped)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (
            ContextLengthError("9 tokens, room for 8"),
            "9 tokens, room for 8, or start anew with /clear",
        ),
        (TokenizerError("the template refuses"), "the template refuses"),
    ],
)
def test_errors_do_not_end_the_chat(
    error: KtError, shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    class Failing:
        def stream(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
            del args, kwargs
            raise error

    assert new_chat(Failing()).handle("hello")
    assert capsys.readouterr().err == f"error: {shown}\n"
