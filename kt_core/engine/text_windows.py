"""A text as windows of tokens, each of which a model reads by itself."""

from __future__ import annotations

from pathlib import Path

from kt_core.engine.engine import Engine
from kt_core.errors import InvalidRequestError

WINDOW_TOKENS = 512
_FEWEST_TOKENS = 16


def read_text(file: Path, option: str) -> str:
    """Return the text of a file.

    Raises:
        InvalidRequestError: It cannot be read; ``option`` is named.
    """
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        msg = f"{option} {file} cannot be read as UTF-8 text: {error}"
        raise InvalidRequestError(msg) from error


def token_windows(engine: Engine, text: str, most_tokens: int) -> list[list[int]]:
    """Cut the beginning of a text into windows; a short rest is left out.

    Raises:
        InvalidRequestError: The text is too short to say anything.
        TokenizerError: The model has no tokenizer.
    """
    tokens = engine.encode(text, raw=True)[:most_tokens]
    windows = [tokens[at : at + WINDOW_TOKENS] for at in range(0, len(tokens), WINDOW_TOKENS)]
    windows = [window for window in windows if len(window) >= _FEWEST_TOKENS]
    if not windows:
        msg = (
            f"the text is {len(tokens)} tokens, at least {_FEWEST_TOKENS} are needed; some "
            "thousand say more"
        )
        raise InvalidRequestError(msg)
    return windows
