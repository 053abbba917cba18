"""What expert deferral does to a model's answers: the same prompts with and without it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kt_core.engine.engine import Engine
from kt_core.errors import InvalidRequestError


@dataclass(frozen=True, slots=True, kw_only=True)
class DeferralEffect:
    """One setting against none.

    Attributes:
        per_token: Pairs that each token may put off in a layer.
        tokens: Positions that were compared.
        kl_divergence: Mean over them of KL(without || with), in nats.
        same_choice: Part of them whose likeliest token is the same.
        largest_difference: Between two logits.
    """

    per_token: int
    tokens: int
    kl_divergence: float
    same_choice: float
    largest_difference: float


def deferral_effects(
    engine: Engine, prompts: Sequence[Sequence[int]], per_token: Sequence[int]
) -> list[DeferralEffect]:
    """Send prompts through the model with each setting; nothing is streamed meanwhile.

    Args:
        engine: On an accelerator, with cold experts on the host.
        prompts: Token ids.
        per_token: Settings to compare with 0.

    Raises:
        InvalidRequestError: The engine has no accelerator, or there is no prompt.
    """
    accelerators = engine.accelerators
    if accelerators is None:
        msg = "experts are deferred where an accelerator works beside the host: choose a --device"
        raise InvalidRequestError(msg)
    if not any(prompts):
        msg = "there is no prompt to compare with"
        raise InvalidRequestError(msg)
    deferral, streamed = accelerators.hybrid.deferral, accelerators.hybrid.streamed
    before, rates = deferral.per_token, streamed.rates
    streamed.rates = None
    try:
        deferral.per_token = 0
        want = [_logits(engine, prompt) for prompt in prompts]
        effects = []
        for count in per_token:
            deferral.per_token = count
            got = [_logits(engine, prompt) for prompt in prompts]
            effects.append(_effect(count, torch.cat(want), torch.cat(got)))
    finally:
        deferral.per_token, streamed.rates = before, rates
    return effects


def _logits(engine: Engine, prompt: Sequence[int]) -> torch.Tensor:
    ids = torch.tensor([list(prompt)], device=engine.model.device)
    with torch.inference_mode():
        logits: torch.Tensor = engine.model(input_ids=ids).logits[0]
    return logits.cpu().double()


def _effect(per_token: int, want: torch.Tensor, got: torch.Tensor) -> DeferralEffect:
    log_want, log_got = want.log_softmax(-1), got.log_softmax(-1)
    divergence = (log_want.exp() * (log_want - log_got)).sum(-1)
    return DeferralEffect(
        per_token=per_token,
        tokens=len(want),
        kl_divergence=float(divergence.mean()),
        same_choice=float((want.argmax(-1) == got.argmax(-1)).double().mean()),
        largest_difference=float((want - got).abs().max()),
    )
