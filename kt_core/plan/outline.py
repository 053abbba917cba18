"""What a plan must know about a model: sizes and work, without a weight. No model is named."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from kt_core.dense.worth import is_worth_packing
from kt_core.packed import LinearLayout
from kt_core.types import Format, LinearSpec, MoeSpec


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
class LinearLayers:
    """Dense layers of one shape, which can be packed as experts are.

    Attributes:
        spec: Their shape.
        count: How many there are.
        element_bytes: Of an element, where they are not packed.
        is_shared: Whether their weight is that of another module too, which keeps it: an output
            head that is tied to the embeddings.
    """

    spec: LinearSpec
    count: int
    element_bytes: int
    is_shared: bool = False

    @property
    def weight_bytes(self) -> int:
        """Bytes of all their weights, biases aside, where they are not packed."""
        return self.count * self.spec.in_features * self.spec.out_features * self.element_bytes

    @property
    def own_bytes(self) -> int:
        """Bytes that are gone once they are packed."""
        biases = self.count * self.spec.out_features * self.element_bytes
        return self.weight_bytes * (not self.is_shared) + biases * self.spec.has_bias

    def packed_bytes(self, weight_format: Format) -> int:
        """Bytes of them in that format, padding and biases included."""
        return self.count * LinearLayout.of(self.spec, weight_format).size_bytes

    def are_worth_packing(self, weight_format: Format) -> bool:
        """Whether they become smaller in that format; else they stay as they are."""
        layout = LinearLayout.of(self.spec, weight_format)
        return is_worth_packing(self.spec, layout.bias_offset, self.element_bytes)


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

    def size_bytes(self, tokens: int, *, keeps_all: bool = False) -> float:
        """Return the bytes after that many tokens; without pushing any out, if it ``keeps_all``."""
        late = self.late_fixed_bytes + self.late_token_bytes * tokens
        if self.token_bytes < self.late_token_bytes:
            return late
        early = self.fixed_bytes + self.token_bytes * tokens
        return early if keeps_all else min(early, late)


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseWork:
    """What everything but the routed experts computes in one forward pass.

    Attributes:
        token_flops: Operations per new token, whatever came before it.
        pair_flops: Operations per pair of a new token and one that it can see.
        attention_flops: As ``pair_flops``, in torch's fused attention.
        attention_bytes: Bytes of keys and values that fused attention reads, per pair.
        token_bytes: Bytes of intermediate tensors that are read or written, per new token.
        pair_bytes: As ``token_bytes``, per pair: what growing and expanding a cache costs.
        threaded_calls: Calls that torch shares out to its threads: matrix products, attention, and
            whatever has large results.
        other_calls: Calls of other operators.
    """

    token_flops: float
    pair_flops: float
    attention_flops: float
    attention_bytes: float
    token_bytes: float
    pair_bytes: float
    threaded_calls: int
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
        linears: Layers that can be packed: of attention, dense MLPs and shared experts, and the
            output head.
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
    linears: tuple[LinearLayers, ...]
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
    def dense_element_bytes(self) -> int:
        """Bytes of one element of ``dense_dtype``."""
        return 2 if self.dense_dtype.endswith("16") else 4

    def total_dense_bytes(self, dense_format: Format | None = None) -> int:
        """Bytes of everything but the routed experts, its linear layers packed or as they are."""
        return sum(self.dense_bytes.values()) - self.saved_bytes(dense_format)

    def packed_dense_bytes(self, dense_format: Format | None) -> int:
        """Bytes of the linear layers in a format; 0 where they stay as they are."""
        if dense_format is None:
            return 0
        return sum(layers.packed_bytes(dense_format) for layers in self._packed(dense_format))

    def saved_bytes(self, dense_format: Format | None) -> int:
        """Bytes by which packing the linear layers makes the model smaller."""
        own = sum(layers.own_bytes for layers in self._packed(dense_format))
        return own - self.packed_dense_bytes(dense_format)

    def unpacked_read_bytes(self, dense_format: Format | None) -> int:
        """Of ``decode_read_bytes``, what is not read as packed weights."""
        replaced = sum(layers.weight_bytes for layers in self._packed(dense_format))
        return self.decode_read_bytes - replaced

    def _packed(self, dense_format: Format | None) -> list[LinearLayers]:
        if dense_format is None:
            return []
        return [layers for layers in self.linears if layers.are_worth_packing(dense_format)]

    def cache_bytes(self, tokens: int, *, keeps_all: bool = False) -> int:
        """Bytes of the cache of one sequence of that many tokens.

        Args:
            tokens: Of the sequence.
            keeps_all: Windows push nothing out, as where steps are replayed from graphs.
        """
        return round(sum(layer.size_bytes(tokens, keeps_all=keeps_all) for layer in self.cache))
