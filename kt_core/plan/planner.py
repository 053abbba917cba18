"""Put a model on a machine: what goes where, whether it fits, how fast it is, what to change."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from kt_core.errors import UnsupportedFormatError
from kt_core.plan.fitting import RESERVE_BYTES, ExpertBytes, packed_bytes
from kt_core.plan.hot_experts import CARD_RESERVE_BYTES, computing_bytes
from kt_core.plan.machine import ExpertRates, Machine
from kt_core.plan.outline import ModelOutline
from kt_core.plan.roofline import (
    Speed,
    Times,
    decode_times,
    prefill_times,
    same_fraction,
)
from kt_core.plan.training import TrainingMemory, training_memory
from kt_core.types import Format


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What the user wants.

    Attributes:
        context: Tokens of prompt and answer that the cache must hold.
        prompt: Tokens of a prompt; speeds are predicted for it.
        hot_experts: Experts to put on the accelerator; None for as many as fit.
        lora_rank: For fine-tuning.
        sequence_length: For fine-tuning.
    """

    context: int
    prompt: int
    hot_experts: int | None = None
    lora_rank: int = 16
    sequence_length: int = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class Formats:
    """What the weights become.

    Attributes:
        experts: Routed experts.
        dense: Linear layers of the rest; None where they stay as the checkpoint has them.
    """

    experts: Format
    dense: Format | None = None

    @property
    def options(self) -> str:
        """The options that ask for them."""
        dense = "" if self.dense is None else f" --dense-format {self.dense.name}"
        return f"--format {self.experts.name}{dense}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A model on a machine.

    Attributes:
        formats: What the weights become.
        fits: Whether everything finds room.
        bytes_by_tier: ``host`` and, with one, ``accelerator``: bytes by part.
        capacity_by_tier: Bytes there are.
        hot_experts: Experts on the accelerator, of all layers together.
        num_experts: Experts there are.
        max_context: Tokens whose cache fits, if hot experts make room for it.
        decode: Times of one token after the prompt.
        prefill: Times of the prompt.
        prompt: Tokens of the prompt.
        training: Memory of fine-tuning, besides the weights.
    """

    formats: Formats
    fits: bool
    bytes_by_tier: Mapping[str, Mapping[str, int]]
    capacity_by_tier: Mapping[str, int]
    hot_experts: int
    num_experts: int
    max_context: int
    decode: Times
    prefill: Times
    prompt: int
    training: TrainingMemory

    @property
    def total_weight_bytes(self) -> int:
        """Weights of all tiers."""
        return sum(
            size
            for parts in self.bytes_by_tier.values()
            for part, size in parts.items()
            if part in {"dense_weights", "expert_weights"}
        )

    @property
    def decode_tokens_per_s(self) -> float:
        """New tokens per second, after the prompt."""
        return 1 / self.decode.total_s

    @property
    def prefill_tokens_per_s(self) -> float:
        """Tokens of the prompt per second."""
        return self.prompt / self.prefill.total_s

    def used_bytes(self, tier: str) -> int:
        """Return the bytes of all parts in a tier."""
        return sum(self.bytes_by_tier[tier].values())

    def missing_bytes(self, tier: str) -> int:
        """Return what a tier lacks; 0 where it has enough."""
        return max(0, self.used_bytes(tier) - self.capacity_by_tier[tier])


@dataclass(frozen=True, slots=True, kw_only=True)
class Planner:
    """Makes plans of one model on one machine.

    Attributes:
        outline: The model.
        machine: The machine.
        expert_bytes: Bytes of one packed expert.
        expert_rates: How fast the host computes a format.
        hit_rate: See ``Speed``.
    """

    outline: ModelOutline
    machine: Machine
    expert_bytes: ExpertBytes
    expert_rates: Callable[[Format], ExpertRates]
    hit_rate: Callable[[float], float] = same_fraction

    def plan(self, formats: Formats, wish: Wish) -> Plan:
        """Return the plan with these formats, whether it fits or not."""
        hot, tiers, capacity = self._place(formats, wish, wish.context)
        speed = self.speed(formats, hot / max(1, self.outline.num_experts))
        return Plan(
            formats=formats,
            fits=_fits(tiers, capacity),
            bytes_by_tier=tiers,
            capacity_by_tier=capacity,
            hot_experts=hot,
            num_experts=self.outline.num_experts,
            max_context=self._max_context(formats, wish),
            decode=decode_times(self.outline, speed, wish.prompt),
            prefill=prefill_times(self.outline, speed, wish.prompt),
            prompt=wish.prompt,
            training=training_memory(self.outline, wish.lora_rank, wish.sequence_length),
        )

    def best_plan(self, choices: Sequence[Formats], wish: Wish) -> Plan:
        """Return the plan of the first choice that fits; of the last where none does.

        Raises:
            UnsupportedFormatError: There is no choice.
        """
        if not choices:
            msg = "there is no weight format to plan with"
            raise UnsupportedFormatError(msg)
        for formats in choices:
            plan = self.plan(formats, wish)
            if plan.fits:
                break
        return plan

    def speed(self, formats: Formats, hot_fraction: float) -> Speed:
        """Return what the times of a placement depend on."""
        return Speed(
            machine=self.machine,
            experts=self.expert_rates(formats.experts),
            dense_format=formats.dense,
            packed=tuple(
                self.expert_bytes(layer.spec, formats.experts)
                for layer in self.outline.expert_layers
            ),
            hot_fraction=hot_fraction,
            hit_rate=self.hit_rate,
        )

    def _place(
        self, formats: Formats, wish: Wish, context: int
    ) -> tuple[int, dict[str, dict[str, int]], dict[str, int]]:
        """Return hot experts, bytes by tier and part, and capacity by tier."""
        outline, card = self.outline, self.machine.card
        specs = [layer.spec for layer in outline.expert_layers]
        experts = packed_bytes(specs, formats.experts, self.expert_bytes)
        saved = outline.saved_bytes(formats.dense)
        computing = computing_bytes(
            outline, context, wish.prompt, saved, keeps_all=card is not None
        )
        if card is None:
            host = {"expert_weights": experts, **computing, "reserve": RESERVE_BYTES}
            return 0, {"host": host}, {"host": self.machine.memory_bytes}
        computing["reserve"] = card.count * CARD_RESERVE_BYTES
        largest = max((self.expert_bytes(spec, formats.experts) for spec in specs), default=1)
        free = card.total_memory_bytes - sum(computing.values())
        fitting = min(outline.num_experts, max(0, free // largest))
        wanted = wish.hot_experts
        hot = fitting if wanted is None else min(wanted, outline.num_experts)
        # Hot experts are the same share of every layer.
        hot_bytes = round(experts * hot / max(1, outline.num_experts))
        tiers = {
            "accelerator": {"expert_weights": hot_bytes, **computing},
            "host": {"expert_weights": experts - hot_bytes, "reserve": RESERVE_BYTES},
        }
        capacity = {"accelerator": card.total_memory_bytes, "host": self.machine.memory_bytes}
        return hot, tiers, capacity

    def _max_context(self, formats: Formats, wish: Wish) -> int:
        """Return the longest context that fits, by bisection: memory grows with it."""
        longest = self.outline.max_context or 1 << 20

        def is_possible(context: int) -> bool:
            _, tiers, capacity = self._place(formats, wish, context)
            return _fits(tiers, capacity)

        if is_possible(longest):
            return longest
        low, high = 0, longest  # low fits (or is nothing), high does not
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if is_possible(middle) else (low, middle)
        return low


def _fits(tiers: Mapping[str, Mapping[str, int]], capacity: Mapping[str, int]) -> bool:
    return all(sum(parts.values()) <= capacity[tier] for tier, parts in tiers.items())
