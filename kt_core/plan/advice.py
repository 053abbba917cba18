"""What to do: sentences about a plan, each of which another plan proves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from kt_core.plan.machine import Card
from kt_core.plan.planner import Formats, Plan, Planner, Wish
from kt_core.plan.units import gigabytes

# A smaller format is worth a word where it makes decoding this much faster.
_WORTHWHILE = 1.2


def advise(planner: Planner, plan: Plan, choices: Sequence[Formats], wish: Wish) -> tuple[str, ...]:
    """Return advice about a plan.

    Args:
        planner: Who made it.
        plan: The plan.
        choices: Formats that could be used, best first.
        wish: What was wished for.
    """
    others = [planner.plan(formats, wish) for formats in choices if formats != plan.formats]
    sentences = _if_it_fits if plan.fits else _if_it_does_not
    return tuple(sentences(planner, plan, others, wish))


def _if_it_does_not(
    planner: Planner, plan: Plan, others: Sequence[Plan], wish: Wish
) -> Iterator[str]:
    for tier in plan.bytes_by_tier:
        if missing := plan.missing_bytes(tier):
            yield (
                f"{tier} memory lacks {gigabytes(missing)}: {gigabytes(plan.used_bytes(tier))} are "
                f"needed with {plan.formats.options}, "
                f"{gigabytes(plan.capacity_by_tier[tier])} are there"
            )
    fitting = [other for other in others if other.fits]
    for other in fitting:
        size = gigabytes(other.total_weight_bytes)
        yield f"it fits with {other.formats.options}: {size} of weights"
    if plan.max_context >= 1:
        yield f"it fits with a context of {plan.max_context} tokens: --context {plan.max_context}"
    if wish.hot_experts:
        fewer = planner.plan(plan.formats, replace(wish, hot_experts=None))
        if fewer.fits:
            hot = fewer.hot_experts
            yield f"it fits with {hot} experts on the accelerator: --hot-experts {hot}"
    if not fitting:
        yield _what_would_do(planner, min((plan, *others), key=lambda p: p.total_weight_bytes))


def _what_would_do(planner: Planner, smallest: Plan) -> str:
    """Name a machine on which the smallest format fits."""
    host = gigabytes(smallest.used_bytes("host"))
    text = f"with {smallest.formats.options} it fits into {host} of host memory (--ram)"
    if planner.machine.card is None:
        return text
    return (
        f"{text} and {gigabytes(smallest.used_bytes('accelerator'))} of accelerator memory (--vram)"
    )


def _if_it_fits(planner: Planner, plan: Plan, others: Sequence[Plan], wish: Wish) -> Iterator[str]:
    yield f"{plan.formats.options}" + (" loses least of what fits" if others else " fits")
    for other in others:
        gain = other.decode_tokens_per_s / plan.decode_tokens_per_s
        if other.fits and gain >= _WORTHWHILE:
            yield (
                f"{other.formats.options} decodes {gain:.1f} times as fast, "
                f"{other.decode_tokens_per_s:.1f} tokens/s, with more loss"
            )
    if card := planner.machine.card:
        yield from _about_hot_experts(planner, plan, wish, card)
    yield _slowest_part(plan)
    outline = planner.outline
    if outline.max_context and plan.max_context < outline.max_context:
        size = gigabytes(outline.cache_bytes(outline.max_context))
        yield (
            f"contexts up to {plan.max_context} tokens fit; the cache of all "
            f"{outline.max_context} that the model was made for takes {size}"
        )
    spare = sum(plan.capacity_by_tier.values()) - sum(map(plan.used_bytes, plan.bytes_by_tier))
    needed = plan.training.total_bytes
    verdict = "fits" if needed <= spare else f"lacks {gigabytes(needed - spare)}"
    yield (
        f"fine-tuning with LoRA of rank {plan.training.lora_rank} and sequences of "
        f"{plan.training.sequence_length} takes {gigabytes(needed)} more: {verdict}"
    )


def _about_hot_experts(planner: Planner, plan: Plan, wish: Wish, card: Card) -> Iterator[str]:
    total = plan.num_experts
    yield (
        f"{plan.hot_experts} of {total} experts ({plan.hot_experts / total:.0%}) find room on the "
        f"accelerator: --hot-experts {plan.hot_experts}"
    )
    if plan.hot_experts < total:
        larger = replace(card, memory_bytes=2 * card.memory_bytes)
        twice = replace(planner, machine=replace(planner.machine, card=larger))
        speed = twice.plan(plan.formats, replace(wish, hot_experts=None)).decode_tokens_per_s
        yield f"with twice the accelerator memory it would decode {speed:.1f} tokens/s"


def _slowest_part(plan: Plan) -> str:
    times = plan.decode
    parts = {
        "attention and the other dense layers": times.dense_s,
        "starting operators": times.calls_s,
        "experts in host memory": times.host_experts_s,
    }
    name, seconds = max(parts.items(), key=lambda part: part[1])
    return f"most of the time for a token goes into {name}: {seconds / times.total_s:.0%}"
