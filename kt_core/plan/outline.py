"""What a plan must know about a model: sizes and work, without a weight. No model is named."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from kt_core.types import MoeSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertLayer:
    """Routed experts of one layer.

    Attributes:
        spec: Their shape.
        top_k: Experts of one token.
    """

    spec: MoeSpec
    top_k: int

    def expected_active(self, tokens: int) -> float:
        """Return how many experts that many tokens meet, if each chooses at random.

        ``E (1 - (1 - k/E)^T)``: the complement of being missed by every token.
        """
        missed = (1 - self.top_k / self.spec.num_experts) ** tokens
        return self.spec.num_experts * (1 - missed)


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheLayer:
    """What one layer keeps of the tokens it has seen, in bytes per sequence.

    Two straight lines, the lower of which holds: the first tokens of a sliding window cost more
    than those that push others out, a recurrent state costs the same for any number.

    Attributes:
        fixed_bytes: Of an empty sequence, early on.
        token_bytes: Of every token, early on.
        late_fixed_bytes: As ``fixed_bytes``, on long sequences.
        late_token_bytes: As ``token_bytes``, on long sequences.
    """

    fixed_bytes: float
    token_bytes: float
    late_fixed_bytes: float
    late_token_bytes: float

    def size_bytes(self, tokens: int) -> float:
        """Return the bytes after that many tokens."""
        late = self.late_fixed_bytes + self.late_token_bytes * tokens
        if self.token_bytes < self.late_token_bytes:
            return late
        return min(self.fixed_bytes + self.token_bytes * tokens, late)


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseWork:
    """What everything but the routed experts computes in one forward pass.

    Attributes:
        token_flops: Operations per new token, whatever came before it.
        pair_flops: Operations per pair of a new token and one that it can see.
        token_bytes: Bytes of intermediate tensors that are read or written, per new token.
        pair_bytes: As ``token_bytes``, per pair: what growing, expanding and reading a cache costs.
        matmuls: Calls of matrix products, attention among them.
        other_calls: Calls of other operators.
    """

    token_flops: float
    pair_flops: float
    token_bytes: float
    pair_bytes: float
    matmuls: int
    other_calls: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOutline:
    """A model as the planner sees it.

    Attributes:
        model_type: ``model_type`` of its config.
        parameters: Elements of all weights.
        dense_dtype: Type of everything but the routed experts.
        dense_bytes: By part, everything but the routed experts.
        decode_read_bytes: Of ``dense_bytes``, what one new token reads.
        expert_layers: Layers with routed experts that have weights of their own.
        linear_features: Inputs plus outputs of all linear layers among the decoder layers; a LoRA
            of rank r on all of them has r times as many parameters.
        cache: One entry per layer that keeps something.
        decode: One new token after ``d`` others: ``d`` pairs.
        prefill: ``n`` new tokens at once: ``n^2`` pairs.
        max_context: Positions the model was made for; None where its config does not say.
        num_layers: Decoder layers.
        hidden_size: Elements of one token's hidden state.
        vocab_size: Tokens there are.
    """

    model_type: str
    parameters: int
    dense_dtype: str
    dense_bytes: Mapping[str, int]
    decode_read_bytes: int
    linear_features: int
    expert_layers: tuple[ExpertLayer, ...]
    cache: tuple[CacheLayer, ...]
    decode: DenseWork
    prefill: DenseWork
    max_context: int | None
    num_layers: int
    hidden_size: int
    vocab_size: int

    @property
    def num_experts(self) -> int:
        """Routed experts of all layers."""
        return sum(layer.spec.num_experts for layer in self.expert_layers)

    @property
    def total_dense_bytes(self) -> int:
        """Bytes of everything but the routed experts."""
        return sum(self.dense_bytes.values())

    def cache_bytes(self, tokens: int) -> int:
        """Bytes of the cache of one sequence of that many tokens."""
        return round(sum(layer.size_bytes(tokens) for layer in self.cache))
