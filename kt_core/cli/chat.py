"""The chat of ``kt run`` on a terminal."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prompt_toolkit import PromptSession
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import create_output

from kt_core.cli.answer import at_work, loading, show_waiting, speed, why_cut
from kt_core.cli.output import complain, remark, write
from kt_core.errors import ContextLengthError, InvalidRequestError, TokenizerError

if TYPE_CHECKING:
    from kt_core.engine import Engine, Timing, TokenEvent

HELP = """\
/help    this list
/clear   forget the conversation
/stats   how the model was loaded, what each device did, and how fast the last answer was
/exit    leave (also Ctrl-D, or Ctrl-C twice)
Ctrl-C stops an answer. Pasted text may have several lines; Alt-Enter starts a new one."""
_COMMAND = re.compile(r"/[a-z]+")


def history_file() -> Path:
    """Return where prompts are remembered: below ``$XDG_STATE_HOME``."""
    base = os.environ.get("XDG_STATE_HOME")
    return (Path(base) if base else Path.home() / ".local" / "state") / "kt" / "chat_history"


def _history() -> History:
    try:
        file = history_file()
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        file.touch(mode=0o600)
    except (OSError, RuntimeError):  # RuntimeError: this user has no home
        return InMemoryHistory()  # no reason not to chat
    return _ChatHistory(str(file))


class _ChatHistory(FileHistory):
    def store_string(self, string: str) -> None:
        """Remember a prompt, unless the disk is full or the file is read-only."""
        with suppress(OSError):
            super().store_string(string)


class Chat:
    """A conversation: the messages so far, and what the last answer took."""

    def __init__(
        self, engine: Engine, *, system: str | None, raw: bool, options: dict[str, Any]
    ) -> None:
        """Start with the system message, if any."""
        self._engine = engine
        self._raw = raw
        self._options = options
        self._start = [{"role": "system", "content": system}] if system else []
        self.messages = list(self._start)
        self._timing: Timing | None = None
        self._commands: dict[str, Callable[[], None]] = {
            "/help": lambda: remark(HELP),
            "/clear": self._clear,
            "/stats": self._show_stats,
        }

    def handle(self, line: str) -> bool:
        """Obey a command or answer a message; return False to leave."""
        text = line.strip()
        if text in ("/exit", "/quit"):
            return False
        if text in self._commands:
            self._commands[text]()
        elif _COMMAND.fullmatch(text):
            remark(f"there is no {text}; /help lists what there is")
        elif text:
            self._answer(line)
        return True

    def _clear(self) -> None:
        self.messages = list(self._start)
        remark("forgotten")

    def _answer(self, text: str) -> None:
        messages = [*self.messages, {"role": "user", "content": text}]
        prompt: Any = text if self._raw else messages
        pieces: list[str] = []
        try:
            events = self._engine.stream(prompt, raw=self._raw, **self._options)
            self._print(show_waiting(events), pieces)
        except KeyboardInterrupt:
            write("\n")
            remark("(stopped)")
        except ContextLengthError as error:
            complain("error", f"{error}, or start anew with /clear")
        except (InvalidRequestError, TokenizerError) as error:
            complain("error", str(error))
        if pieces and not self._raw:
            self.messages = [*messages, {"role": "assistant", "content": "".join(pieces)}]

    def _print(self, events: Iterator[TokenEvent], pieces: list[str]) -> None:
        """Print the answer, and remember it in ``pieces`` even where Ctrl-C ends it."""
        for event in events:
            write(event.text)
            pieces.append(event.text)
        write("\n")
        assert event.timing is not None
        self._timing = event.timing
        if event.finish_reason == "length":
            remark(why_cut(event.timing, self._options))

    def _show_stats(self) -> None:
        stats = self._engine.stats()
        size = (stats.expert_bytes + stats.dense_bytes) / 1e9
        remark(f"{stats.model_type}, {size:.2f} GB of weights; {loading(stats)}")
        for line in at_work(stats):
            remark(line)
        if self._timing is not None:
            remark(f"last answer: {speed(self._timing)}")


def chat(engine: Engine, *, system: str | None, raw: bool, options: dict[str, Any]) -> None:
    """Read lines and answer them until the user leaves.

    Raises:
        TokenizerError: The model cannot chat; better said before the user has typed something.
    """
    conversation = Chat(engine, system=system, raw=raw, options=options)
    if not raw:
        engine.encode([*conversation.messages, {"role": "user", "content": "?"}])
    session = _session()
    remark(f"{loading(engine.stats())}\n/help lists the commands")
    was_interrupted = False
    while True:
        try:
            if not conversation.handle(session.prompt(">>> ")):
                return
            was_interrupted = False
        except KeyboardInterrupt:
            if was_interrupted:
                return
            was_interrupted = True
            remark("Ctrl-C once more leaves")
        except EOFError:
            return


def _session() -> PromptSession[str]:
    keys = KeyBindings()

    @keys.add("escape", "enter")
    def _start_line(event: KeyPressEvent) -> None:
        event.current_buffer.newline(copy_margin=False)

    output = create_output(always_prefer_tty=True)  # stdout may be a file: kt run M | tee log
    return PromptSession(history=_history(), key_bindings=keys, output=output)
