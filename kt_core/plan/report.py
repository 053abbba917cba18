"""A plan as JSON: the keys that docs/cli.md lists."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from kt_core.plan.planner import Plan, Planner, Wish
from kt_core.plan.roofline import Times

_CONTEXTS = (4096, 32768, 131072)


def report_of(
    name: str, planner: Planner, plan: Plan, wish: Wish, advice: Sequence[str]
) -> dict[str, Any]:
    """Return the report; sizes in bytes, times in seconds."""
    outline, machine = planner.outline, planner.machine
    dense = plan.formats.dense
    experts = sum(parts.get("expert_weights", 0) for parts in plan.bytes_by_tier.values())
    longest = outline.max_context or max(_CONTEXTS)
    contexts = sorted({n for n in _CONTEXTS if n < longest} | {wish.context, longest})
    return {
        "model": name,
        "model_type": outline.model_type,
        "parameters": outline.parameters,
        "format": plan.formats.experts.name,
        "dense_format": dense.name if dense else "none",
        "dense_dtype": outline.dense_dtype,
        "fits": plan.fits,
        "total_weight_bytes": plan.total_weight_bytes,
        "weight_bytes_by_part": {"routed_experts": experts, **outline.dense_bytes},
        "saved_by_dense_format_bytes": outline.saved_bytes(dense),
        "bytes_by_tier": {tier: dict(parts) for tier, parts in plan.bytes_by_tier.items()},
        "capacity_by_tier": dict(plan.capacity_by_tier),
        "missing_by_tier": {tier: plan.missing_bytes(tier) for tier in plan.bytes_by_tier},
        "context": wish.context,
        "max_context": plan.max_context,
        "kv_cache_bytes_by_context": {
            str(context): outline.cache_bytes(context) for context in contexts
        },
        "num_experts": plan.num_experts,
        "hot_experts": plan.hot_experts,
        "hot_fraction": plan.hot_experts / plan.num_experts,
        "prompt_tokens": plan.prompt,
        "decode_tokens_per_s": round(plan.decode_tokens_per_s, 3),
        "prefill_tokens_per_s": round(plan.prefill_tokens_per_s, 3),
        "decode_s": _times(plan.decode),
        "prefill_s": _times(plan.prefill),
        "fine_tuning": {**asdict(plan.training), "total_bytes": plan.training.total_bytes},
        "machine": {
            "memory_bytes": machine.memory_bytes,
            "cores": machine.cores,
            "host": asdict(machine.host),
            "accelerator": asdict(machine.card) if machine.card else None,
        },
        "assumptions": list(machine.assumptions),
        "advice": list(advice),
    }


def _times(times: Times) -> dict[str, float]:
    return {**asdict(times), "total_s": times.total_s}
