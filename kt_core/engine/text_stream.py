"""Tokens to text while they come: whole characters only, and nothing past a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

_UNFINISHED = "\ufffd"  # what decoders show for the first bytes of a character


class Decoder(Protocol):
    """The one method of a tokenizer that is needed here."""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Return the text of the tokens."""


class TextStream:
    """Text of a growing sequence of tokens, handed out piece by piece.

    A token can be part of a character, and what a token reads depends on the ones before it. So a
    short tail is decoded again with each token, and handed out once it cannot change any more. Text
    that may be the beginning of a stop string is kept back until it is decided.

    Attributes:
        text: All text handed out so far.
        is_stopped: Whether a stop string was met; ``text`` ends before it.
    """

    def __init__(self, decoder: Decoder, stop: Sequence[str] = ()) -> None:
        """Take who decodes, and the strings to stop at."""
        self._decoder = decoder
        self._stop = tuple(s for s in stop if s)
        self._tokens: list[int] = []
        self._tail_start = 0  # tokens before it are decoded for good
        self._read_end = 0  # tokens before it have been turned into text
        self._held = ""  # text that may yet be part of a stop string
        self.text = ""
        self.is_stopped = False

    def push(self, token: int) -> str:
        """Add a token and return the text that is now certain."""
        self._tokens.append(token)
        before = self._decode(self._tail_start, self._read_end)
        now = self._decode(self._tail_start, len(self._tokens))
        if len(now) <= len(before) or now.endswith(_UNFINISHED):
            return ""
        self._tail_start, self._read_end = self._read_end, len(self._tokens)
        return self._emit(self._held + now[len(before) :])

    def finish(self) -> str:
        """Return what was kept back, at the end of the sequence."""
        if self.is_stopped:
            return ""
        before = self._decode(self._tail_start, self._read_end)
        rest = self._held + self._decode(self._tail_start, len(self._tokens))[len(before) :]
        self._held, self._read_end = "", len(self._tokens)
        end = self._stop_at(rest)
        if end is not None:
            rest, self.is_stopped = rest[:end], True
        self.text += rest
        return rest

    def _decode(self, first: int, last: int) -> str:
        return self._decoder.decode(self._tokens[first:last], skip_special_tokens=True)

    def _stop_at(self, text: str) -> int | None:
        """Where the stop string begins that is complete first, however tokens cut the text."""
        found = [(at + len(s), at) for s in self._stop if (at := text.find(s)) >= 0]
        return min(found)[1] if found else None

    def _emit(self, text: str) -> str:
        end = self._stop_at(text)
        if end is not None:
            self.is_stopped = True
            self._held = ""
        else:
            end = len(text) - self._suspicious(text)
            self._held = text[end:]
        self.text += text[:end]
        return text[:end]

    def _suspicious(self, text: str) -> int:
        """Length of the longest end of the text that a stop string begins with."""
        longest = max((len(s) for s in self._stop), default=1) - 1
        for size in range(min(longest, len(text)), 0, -1):
            if any(s.startswith(text[-size:]) for s in self._stop):
                return size
        return 0
