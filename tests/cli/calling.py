"""What the tests of the command line call ``kt`` with, and what they get back."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STORIES = Path(__file__).parents[1] / "data" / "stories-moe"
# The format it was trained on: train_stories_moe.py in the prototypes.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a call of ``kt`` left behind."""

    code: int
    out: str
    err: str

    def fails(self, *parts: str, code: int = 1) -> str:
        """Check that it is one clear error and nothing else, and return the message."""
        assert self.out == ""
        assert "Traceback" not in self.err
        assert self.err.startswith("error: ")
        assert self.err.count("\n") == 1
        for part in parts:
            assert part in self.err
        assert self.code == code
        return self.err

    def succeeds(self) -> str:
        """Check that it worked, and return what it printed."""
        assert (self.code, "Traceback" in self.err, "error:" in self.err) == (0, False, False)
        return self.out


Kt = Callable[..., Outcome]


class Input(io.TextIOWrapper):
    """Stands for a pipe or, without text, for a terminal."""

    def __init__(self, data: bytes | None) -> None:
        super().__init__(io.BytesIO(data or b""), encoding="utf-8")
        self._is_terminal = data is None

    def isatty(self) -> bool:
        return self._is_terminal


def edit_json(file: Path, **changes: Any) -> None:
    """Change entries of a JSON object in a file."""
    values = json.loads(file.read_text(encoding="utf-8")) | changes
    file.write_text(json.dumps(values), encoding="utf-8")
