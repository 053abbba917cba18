"""Memory of fine-tuning with LoRA: the packed weights are frozen, adapters have all else.

Estimates, from what docs/training.md says is kept: nothing of the experts between the passes, and
with gradient checkpointing the hidden states between layers.
"""

from __future__ import annotations

from dataclasses import dataclass

from kt_core.plan.outline import ModelOutline

# float32 weight, its gradient, and the two moments of Adam.
_BYTES_PER_PARAMETER = 4 * 4
_FLOAT32 = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingMemory:
    """What training takes besides the weights of the model.

    Attributes:
        lora_rank: Rank of every adapter.
        sequence_length: Tokens of a batch.
        lora_parameters: On every projection of every expert, and on every linear layer.
        adapter_bytes: Adapters with gradients and Adam's moments, float32.
        activation_bytes: Hidden states of every layer, and one layer that is computed again.
        logits_bytes: Logits and their gradient, float32.
    """

    lora_rank: int
    sequence_length: int
    lora_parameters: int
    adapter_bytes: int
    activation_bytes: int
    logits_bytes: int

    @property
    def total_bytes(self) -> int:
        """Besides the weights."""
        return self.adapter_bytes + self.activation_bytes + self.logits_bytes


def training_memory(outline: ModelOutline, lora_rank: int, sequence_length: int) -> TrainingMemory:
    """Return what LoRA of that rank takes with sequences of that length, one at a time."""
    expert_features = 0
    widest = 0
    for layer in outline.expert_layers:
        spec = layer.spec
        projections = 3 if spec.activation.is_gated else 2
        features = projections * (spec.hidden_size + spec.intermediate_size)
        expert_features += spec.num_experts * features
        widest = max(widest, layer.top_k * (3 * spec.intermediate_size + 2 * spec.hidden_size))
    linear_features = sum(
        layers.count * (layers.spec.in_features + layers.spec.out_features)
        for layers in outline.linears
    )
    parameters = lora_rank * (expert_features + linear_features)
    between = outline.num_layers * outline.hidden_size * outline.dense_element_bytes
    again = _FLOAT32 * (8 * outline.hidden_size + widest)
    return TrainingMemory(
        lora_rank=lora_rank,
        sequence_length=sequence_length,
        lora_parameters=parameters,
        adapter_bytes=_BYTES_PER_PARAMETER * parameters,
        activation_bytes=sequence_length * (between + again),
        logits_bytes=2 * _FLOAT32 * sequence_length * outline.vocab_size,
    )
