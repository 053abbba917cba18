"""Sizes and rates as people write them: ``24GiB``, ``200GB/s``, ``165TFLOP/s``."""

from __future__ import annotations

import re

from kt_core.errors import InvalidRequestError

_DECIMAL = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "P": 10**15}
_BINARY = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "Pi": 2**50}
_QUANTITY = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kKMGTP]i?|)([A-Za-z/]+)\s*")


def parse_bytes(text: str, what: str) -> int:
    """Return bytes: ``24GiB`` is 24 * 2^30, ``24GB`` 24 * 10^9.

    Args:
        text: A number and a unit; a number alone is refused, it could mean anything.
        what: Word for the error, such as ``--ram``.

    Raises:
        InvalidRequestError: It is no such thing.
    """
    return int(_parse(text, what, {"B"}, example="24GiB or 24GB"))


def parse_bytes_per_s(text: str, what: str) -> float:
    """Return bytes per second: ``200GB/s``; errors as for ``parse_bytes``."""
    return _parse(text, what, {"B/s"}, example="200GB/s")


def parse_ops_per_s(text: str, what: str) -> float:
    """Return operations per second, a multiply-add being two: ``165TFLOP/s``, ``30TOP/s``."""
    return _parse(text, what, {"FLOP/s", "FLOPS", "OP/s", "OPS"}, example="165TFLOP/s")


def _parse(text: str, what: str, units: set[str], *, example: str) -> float:
    match = _QUANTITY.fullmatch(text)
    if match is None or match[3] not in units:
        msg = f"{what} must be a number with its unit, such as {example}, got {text!r}"
        raise InvalidRequestError(msg)
    value = float(match[1]) * (_DECIMAL | _BINARY)[match[2]]
    if value <= 0:
        msg = f"{what} must be above 0, got {text!r}"
        raise InvalidRequestError(msg)
    return value


def gigabytes(size_bytes: float) -> str:
    """Return a size for people, in units of 10^9 bytes."""
    return f"{size_bytes / 1e9:.2f} GB" if size_bytes < 1e11 else f"{size_bytes / 1e9:.0f} GB"
