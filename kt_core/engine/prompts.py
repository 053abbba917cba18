"""A file of prompts: plain lines, or JSON lines."""

from __future__ import annotations

import json
from pathlib import Path

from kt_core.engine.engine import Prompt
from kt_core.errors import InvalidRequestError


def read_prompts(file: Path) -> list[Prompt]:
    r"""Read prompts: in a ``.jsonl`` file one JSON value a line, else one prompt a line.

    A JSON value is a string, ``{"prompt": "..."}`` or ``{"messages": [{"role": ..., "content":
    ...}]}``; other keys are passed over. Empty lines are no prompts.

    Raises:
        InvalidRequestError: The file cannot be read, holds no prompt, or a line is something else.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeError) as error:
        msg = f"cannot read the prompts in {str(file)!r}: {error}; give a UTF-8 text file"
        raise InvalidRequestError(msg) from error
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        msg = f"{str(file)!r} holds no prompts; write one on each line"
        raise InvalidRequestError(msg)
    if file.suffix != ".jsonl":
        return [line for _, line in numbered]
    return [_from_json(line, f"line {number} of {str(file)!r}") for number, line in numbered]


def _from_json(line: str, where: str) -> Prompt:
    try:
        value = json.loads(line)
    except ValueError as error:
        msg = f"{where} is no JSON: {error}; or name the file .txt if it is plain text"
        raise InvalidRequestError(msg) from error
    if isinstance(value, dict):
        value = value.get("messages", value.get("prompt"))
    is_messages = isinstance(value, list) and all(
        isinstance(m, dict) and isinstance(m.get("content"), str) and "role" in m for m in value
    )
    if value and (isinstance(value, str) or is_messages):
        prompt: Prompt = value
        return prompt
    msg = f'{where} is no prompt: write a string, {{"prompt": ...}} or {{"messages": [...]}}'
    raise InvalidRequestError(msg)
