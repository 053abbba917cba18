"""A plan as tables."""

from __future__ import annotations

from typing import Any

from kt_core.cli.output import show, table
from kt_core.plan.units import gigabytes


def show_plan(report: dict[str, Any]) -> None:
    """Print the report of ``kt plan``."""
    rows = table()
    billions = report["parameters"] / 1e9
    rows.add_row(
        "model", f"{report['model']} ({report['model_type']}), {billions:.1f} B parameters"
    )
    rows.add_row("machine", _machine(report["machine"]))
    packed = report["dense_format"]
    dense = "" if packed == "none" else f", its linear layers {packed}"
    rows.add_row("format", f"{report['format']} experts, {report['dense_dtype']} the rest{dense}")
    rows.add_row("fits", "yes" if report["fits"] else "no")
    rows.add_row("weights", _weights(report))
    rows.add_row(
        "cache",
        ", ".join(
            f"{gigabytes(size)} for {context} tokens"
            for context, size in report["kv_cache_bytes_by_context"].items()
        ),
    )
    rows.add_row("longest context", f"{report['max_context']} tokens")
    hot, experts = report["hot_experts"], report["num_experts"]
    rows.add_row("experts", f"{hot} of {experts} on the accelerator, the others on the host")
    tokens = report["prompt_tokens"]
    rows.add_row(
        "predicted",
        f"{report['decode_tokens_per_s']:.1f} tokens/s after a prompt of {tokens} tokens, "
        f"which is read at {report['prefill_tokens_per_s']:.0f} tokens/s",
    )
    rows.add_row("time of a token", _times(report["decode_s"]))
    training = report["fine_tuning"]
    rows.add_row(
        "fine-tuning",
        f"{gigabytes(training['total_bytes'])} more, LoRA of rank {training['lora_rank']} "
        f"({training['lora_parameters'] / 1e6:.0f} M parameters), sequences of "
        f"{training['sequence_length']}",
    )
    show(rows)
    show("")
    _show_tiers(report)
    for title in ("assumptions", "advice"):
        for number, sentence in enumerate(report[title]):
            if number == 0:
                show("")
                show(title)
            show(f"  {sentence}")


def _show_tiers(report: dict[str, Any]) -> None:
    tiers = report["bytes_by_tier"]
    rows = table("memory", *tiers)
    for column in rows.columns[1:]:
        column.justify = "right"
    parts = dict.fromkeys(part for sizes in tiers.values() for part in sizes)
    for part in parts:
        sizes = (gigabytes(tier[part]) if part in tier else "" for tier in tiers.values())
        rows.add_row(part.replace("_", " "), *sizes)
    rows.add_row("together", *(gigabytes(sum(tier.values())) for tier in tiers.values()))
    rows.add_row("there is", *(gigabytes(report["capacity_by_tier"][tier]) for tier in tiers))
    show(rows)


def _machine(machine: dict[str, Any]) -> str:
    host, card = machine["host"], machine["accelerator"]
    text = f"{machine['cores']} cores, {host['read_bytes_per_s'] / 1e9:.0f} GB/s host memory"
    if card is None:
        return f"{text}, no accelerator"
    return (
        f"{text}, {card['count']} x {gigabytes(card['memory_bytes'])} accelerator of "
        f"{card['read_bytes_per_s'] / 1e9:.0f} GB/s, link {card['link_bytes_per_s'] / 1e9:.0f} GB/s"
    )


def _weights(report: dict[str, Any]) -> str:
    parts = report["weight_bytes_by_part"]
    each = ", ".join(f"{gigabytes(size)} {name.replace('_', ' ')}" for name, size in parts.items())
    saved = report["saved_by_dense_format_bytes"]
    less = f", less {gigabytes(saved)} by packing linear layers" if saved else ""
    return f"{gigabytes(report['total_weight_bytes'])}: {each}{less}"


def _times(times: dict[str, float]) -> str:
    words = {
        "dense_s": "dense layers",
        "calls_s": "starting operators",
        "host_experts_s": "experts on the host",
        "card_experts_s": "experts on the accelerator",
    }
    parts = [f"{times[key] * 1e3:.1f} ms {word}" for key, word in words.items() if times[key]]
    return f"{times['total_s'] * 1e3:.1f} ms: {', '.join(parts)}"
