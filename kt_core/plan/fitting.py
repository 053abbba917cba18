"""What fits: the arithmetic that ``kt plan`` and the check before loading share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TypeAlias

from kt_core.errors import NotEnoughMemoryError
from kt_core.types import Format, MoeSpec

ExpertBytes: TypeAlias = Callable[[MoeSpec, Format], int]

# What loading needs besides the weights: scratch of the packing threads, tokenizer, Python.
RESERVE_BYTES = 300_000_000
# `--format auto` takes the first of these that fits: least loss first.
AUTO_FORMATS = ("bf16", "int8", "int4")
# `kt plan --dense-format auto` the same, for the linear layers of the dense part.
AUTO_DENSE_FORMATS = ("none", "int8")


def format_names(asked_for: str) -> tuple[str, ...]:
    """Return the formats to try, best first."""
    return AUTO_FORMATS if asked_for == "auto" else (asked_for,)


def packed_bytes(specs: Iterable[MoeSpec], weight_format: Format, expert_bytes: ExpertBytes) -> int:
    """Return the bytes of all experts of these layers, packed."""
    return sum(spec.num_experts * expert_bytes(spec, weight_format) for spec in specs)


def first_that_fits(
    packed: Mapping[str, int],
    dense_bytes: int,
    available_bytes: int,
    *,
    smaller: str = "--format int4",
) -> str:
    """Return the first format whose experts fit into host memory beside the dense part.

    Args:
        packed: Bytes of all packed experts, by format, best first.
        dense_bytes: Of everything else.
        available_bytes: Host memory there is.
        smaller: Options that would make the model smaller, for the message.

    Raises:
        NotEnoughMemoryError: None fits; the message says what each needs.
    """
    needed = {name: size + dense_bytes + RESERVE_BYTES for name, size in packed.items()}
    for name, size in needed.items():
        if size <= available_bytes:
            return name
    sizes = ", ".join(f"{size / 1e9:.2f} GB as {name}" for name, size in needed.items())
    msg = (
        f"not enough memory: the model needs {sizes} ({dense_bytes / 1e9:.2f} GB of it for the "
        f"dense part), {available_bytes / 1e9:.2f} GB are available. "
        f"Close other programs, or choose a smaller format ({smaller})."
    )
    raise NotEnoughMemoryError(msg)


def check_dense_fits(dense_bytes: int, available_bytes: int) -> None:
    """Check that there is room for a model whose experts are mapped, and need none of their own.

    Args:
        dense_bytes: Of what is not mapped.
        available_bytes: Host memory there is.

    Raises:
        NotEnoughMemoryError: There is not.
    """
    needed = dense_bytes + RESERVE_BYTES
    if needed > available_bytes:
        msg = (
            f"not enough memory: the dense part of the model needs {needed / 1e9:.2f} GB, "
            f"{available_bytes / 1e9:.2f} GB are available; its experts stay in their files. "
            "Close other programs, or pack the original model with `kt quant --dense-format int8`."
        )
        raise NotEnoughMemoryError(msg)
