"""How many experts an accelerator holds: the wish of the user, and the room that is left."""

from __future__ import annotations

import re

from kt_core.errors import InvalidRequestError, NotEnoughMemoryError
from kt_core.interfaces import ExpertGrid
from kt_core.plan.outline import ModelOutline

# The runtime of an accelerator and what its allocator cannot use.
CARD_RESERVE_BYTES = 800_000_000
# Of a small device the runtime takes less, or nothing would be left.
_RESERVE_SHARE = 0.1
# Hidden states, residuals, projections and what lies between, of one token of a prompt, in hidden
# states of float32; and the same of its experts.
_STATES_PER_TOKEN = 12


def computing_bytes(
    outline: ModelOutline,
    context: int,
    prompt: int,
    saved_dense_bytes: int = 0,
    *,
    keeps_all: bool = False,
) -> dict[str, int]:
    """Return what lies where hidden states do, besides experts.

    Args:
        outline: The model.
        context: Tokens that the cache holds.
        prompt: Tokens that are computed at once.
        saved_dense_bytes: By how much packed dense layers make it smaller.
        keeps_all: As for ``ModelOutline.cache_bytes``.
    """
    return {
        "dense_weights": outline.total_dense_bytes() - saved_dense_bytes,
        "kv_cache": outline.cache_bytes(context, keeps_all=keeps_all),
        "scratch": _scratch_bytes(outline, min(prompt, context)),
    }


def _scratch_bytes(outline: ModelOutline, tokens: int) -> int:
    """Estimate what a forward pass holds besides weights and cache."""
    inner = max(
        (
            layer.top_k * (2 * layer.spec.intermediate_size + layer.spec.hidden_size)
            for layer in outline.expert_layers
        ),
        default=0,
    )
    return 4 * (tokens * (_STATES_PER_TOKEN * outline.hidden_size + inner) + outline.vocab_size)


def card_reserve_bytes(memory_bytes: int) -> int:
    """Return what is kept free of a device with so much memory."""
    return min(CARD_RESERVE_BYTES, int(_RESERVE_SHARE * memory_bytes))


def hot_budget_bytes(wish: str, grid: ExpertGrid, room_bytes: int) -> int:
    """Return the bytes of experts to put on accelerators.

    Args:
        wish: ``auto`` for as many as fit, a number of experts such as ``96``, or a share of all
            such as ``25%``.
        grid: All experts.
        room_bytes: What accelerators have left for experts.

    Raises:
        InvalidRequestError: ``wish`` is none of these, or there are fewer experts.
        NotEnoughMemoryError: So many do not fit.
    """
    total = sum(grid.num_experts)
    if wish == "auto":
        return max(0, min(room_bytes, grid.total_bytes))
    if found := re.fullmatch(r"(\d+(?:\.\d+)?)%", wish):
        share = float(found[1]) / 100
        if share > 1:
            msg = f"--hot-experts {wish}: a share is at most 100%"
            raise InvalidRequestError(msg)
        wanted = int(share * grid.total_bytes)
    elif wish.isdecimal():
        if int(wish) > total:
            msg = f"--hot-experts {wish}: the model has {total} experts in all layers together"
            raise InvalidRequestError(msg)
        wanted = int(wish) * max(grid.expert_bytes)
    else:
        msg = (
            f"--hot-experts {wish!r} is neither auto, a number of experts such as 96, nor a share "
            "such as 25%"
        )
        raise InvalidRequestError(msg)
    if wanted > room_bytes:
        most = max(0, room_bytes) // max(grid.expert_bytes)
        msg = (
            f"--hot-experts {wish} takes {wanted / 1e9:.2f} GB on the accelerator, "
            f"{max(0, room_bytes) / 1e9:.2f} GB are left beside the dense part and the cache: "
            f"ask for at most {most}, or for auto"
        )
        raise NotEnoughMemoryError(msg)
    return wanted
