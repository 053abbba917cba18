"""How long a forward pass takes: bytes over bandwidth, operations over peak, cost of calls.

Each part takes the longer of what its bytes and its operations need; parts that wait for each other
add up, parts that run at the same time (experts on the host and on the accelerator) count as the
longer one. docs/planning.md has the formulas and what they are worth.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from kt_core.plan.machine import Card, ExpertRates, Machine
from kt_core.plan.outline import DenseWork, ExpertLayer, ModelOutline
from kt_core.types import Format


@dataclass(frozen=True, slots=True, kw_only=True)
class CardEfficiency:
    """What part of an accelerator's data sheet is reached, and what its calls cost.

    Assumed, not measured: kt has not computed on an accelerator yet.

    Attributes:
        read: Of its memory's bandwidth.
        operations: Of its bf16 peak, with many tokens.
        link: Of the link's bandwidth.
        host_read: Of host memory's bandwidth, for what goes through the link.
        layer_s: Seconds per layer for starting kernels and for meeting the host again.
        recomputes_cache: Whether operations that transformers spends on every cached token (the
            up-projection of latents) are spent; not where attention works on the latents.
    """

    read: float = 0.8
    operations: float = 0.5
    link: float = 0.8
    host_read: float = 0.85
    layer_s: float = 60e-6
    recomputes_cache: bool = True


def same_fraction(hot_fraction: float) -> float:
    """Return the part of a token's experts that is hot, if all experts are as likely."""
    return hot_fraction


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """What the times depend on besides the model.

    Attributes:
        machine: Where it runs.
        experts: How fast the host computes experts.
        packed: Bytes of one packed expert of each layer, in the order of ``expert_layers``.
        dense_format: What the linear layers are packed as; None where they stay as they are.
        hot_fraction: Part of all experts that is on the accelerator.
        hit_rate: Part of a token's experts that finds itself there, by ``hot_fraction``; a curve
            from recorded routing goes here.
        card: Efficiency of the accelerator.
        stream_from: Tokens of a prompt from which cold experts go through the link; None
            for whatever is faster.
        expert_time_factor: By what the host's time for experts is multiplied: 1, but for comparing
            with other programs.
    """

    machine: Machine
    experts: ExpertRates
    packed: tuple[int, ...]
    dense_format: Format | None = None
    hot_fraction: float = 0.0
    hit_rate: Callable[[float], float] = same_fraction
    card: CardEfficiency = field(default_factory=CardEfficiency)
    stream_from: int | None = None
    expert_time_factor: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """Where the seconds of one forward pass go.

    Attributes:
        dense_s: Everything but the routed experts.
        calls_s: Starting operators, where that is not hidden.
        host_experts_s: Experts in host memory.
        card_experts_s: Experts on the accelerator, at the same time.
        link_s: Waiting for weights that are streamed to the accelerator.
    """

    dense_s: float
    calls_s: float
    host_experts_s: float
    card_experts_s: float
    link_s: float = 0.0

    @property
    def total_s(self) -> float:
        """Of the whole pass."""
        experts = max(self.host_experts_s, self.card_experts_s, self.link_s)
        return self.dense_s + self.calls_s + experts


def decode_times(outline: ModelOutline, speed: Speed, context: int) -> Times:
    """Return the times of one new token after ``context`` others."""
    return _pass(outline, speed, outline.decode, tokens=1, pairs=context)


def prefill_times(outline: ModelOutline, speed: Speed, tokens: int) -> Times:
    """Return the times of a prompt, computed at once.

    With an accelerator the faster of two ways counts: cold experts on the host, or streamed to it.
    """
    computed = _pass(outline, speed, outline.prefill, tokens=tokens, pairs=tokens**2)
    card = speed.machine.card
    if card is None:
        return computed
    streamed = _streamed(outline, speed, card, computed, tokens)
    if speed.stream_from is not None:
        return streamed if tokens >= speed.stream_from else computed
    return min(computed, streamed, key=lambda times: times.total_s)


def _pass(
    outline: ModelOutline, speed: Speed, work: DenseWork, *, tokens: int, pairs: int
) -> Times:
    card = speed.machine.card
    hit = speed.hit_rate(speed.hot_fraction) if card else 0.0
    host_s = card_s = 0.0
    for layer, size in zip(outline.expert_layers, speed.packed, strict=True):
        active = layer.expected_active(tokens) * size
        operations = 2.0 * tokens * layer.top_k * layer.spec.weights_per_expert
        if hit < 1:
            rates = speed.experts
            cold_s = max(active / rates.read_bytes_per_s, operations / rates.ops_per_s) * (1 - hit)
            host_s += speed.expert_time_factor * cold_s + speed.machine.host.expert_call_s
        if card:
            card_s += hit * _card_s(card, speed.card, active, operations)
    dense_s, calls_s = _dense(outline, speed, work, tokens=tokens, pairs=pairs)
    return Times(dense_s=dense_s, calls_s=calls_s, host_experts_s=host_s, card_experts_s=card_s)


def _dense(
    outline: ModelOutline, speed: Speed, work: DenseWork, *, tokens: int, pairs: int
) -> tuple[float, float]:
    """Return the seconds of the dense part, and of starting its operators."""
    card, host = speed.machine.card, speed.machine.host
    pair_flops = work.pair_flops + (work.attention_flops if card else 0.0)
    if card and not speed.card.recomputes_cache:
        pair_flops = min(pair_flops, outline.prefill.pair_flops + outline.prefill.attention_flops)
    flops = work.token_flops * tokens + pair_flops * pairs
    moved = work.token_bytes * tokens + work.pair_bytes * pairs
    packed = outline.packed_dense_bytes(speed.dense_format)
    weights = outline.unpacked_read_bytes(speed.dense_format)
    if card:
        read = outline.cache_bytes(pairs if tokens == 1 else tokens)  # kernels hold the rest
        return _card_s(card, speed.card, weights + packed + read, flops), (
            speed.card.layer_s * outline.num_layers
        )
    read_s = weights / host.dense_read_bytes_per_s + packed / speed.experts.read_bytes_per_s
    dense_s = max(read_s, flops / host.dense_ops_per_s)
    dense_s += moved / host.dense_read_bytes_per_s
    dense_s += pairs * max(
        work.attention_bytes / host.attention_read_bytes_per_s,
        work.attention_flops / host.attention_ops_per_s,
    )
    return dense_s, work.threaded_calls * host.threaded_call_s + work.other_calls * host.call_s


def _streamed(
    outline: ModelOutline, speed: Speed, card: Card, computed: Times, tokens: int
) -> Times:
    """Cold experts go through the link, layer by layer, while the layer before is computed."""
    cold = sum(
        layer.spec.num_experts * size * (1 - speed.hot_fraction)
        for layer, size in zip(outline.expert_layers, speed.packed, strict=True)
    )
    link_s = max(
        cold / (card.count * card.link_bytes_per_s * speed.card.link),
        cold / (speed.machine.host.read_bytes_per_s * speed.card.host_read),
    )
    compute_s = sum(
        _card_s(card, speed.card, layer.expected_active(tokens) * size, _operations(layer, tokens))
        for layer, size in zip(outline.expert_layers, speed.packed, strict=True)
    )
    return Times(
        dense_s=computed.dense_s,
        calls_s=computed.calls_s,
        host_experts_s=0.0,
        card_experts_s=compute_s,
        link_s=link_s,
    )


def _operations(layer: ExpertLayer, tokens: int) -> float:
    return 2.0 * tokens * layer.top_k * layer.spec.weights_per_expert


def _card_s(card: Card, efficiency: CardEfficiency, size: float, operations: float) -> float:
    read_s = size / (card.read_bytes_per_s * efficiency.read)
    compute_s = operations / (card.ops_per_s * efficiency.operations)
    return max(read_s, compute_s) / card.count
