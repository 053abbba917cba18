"""The numbers of ``BackendContract``: every answer against the float64 reference.

The reference works on the same dequantised weights, and the tolerance is derived from the shapes:
see ``kt_core.testing.reference``.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from kt_core.interfaces import ExpertWeights, QuantizedTensor, WeightFormat
from kt_core.testing.backend_harness import (
    SPEC,
    BackendHarness,
    Pairs,
    check_shape,
    random_layer,
    random_pairs,
)
from kt_core.types import Activation, Element, MoeSpec


class BackendNumbers(BackendHarness):
    """Part of ``BackendContract``."""

    def test_matches_the_reference(self, weight_format: WeightFormat, tokens: int) -> None:
        """Every format and precision, from no token to more than a vector register holds."""
        with self.open() as device:
            self.check(device, SPEC, weight_format, random_pairs(SPEC, tokens), seed=tokens)

    def test_types_of_hidden_states(self, weight_format: WeightFormat) -> None:
        """The result has the type of the hidden states."""
        with self.open() as device:
            for dtype in (torch.bfloat16, torch.float16, torch.float32):
                pairs = random_pairs(SPEC, 5, dtype=dtype)
                self.check(device, SPEC, weight_format, pairs)

    def test_odd_shapes(self, weight_format: WeightFormat) -> None:
        """Sizes of one, and on both sides of a vector register."""
        with self.open() as device:
            for hidden, inner in ((1, 1), (15, 17), (33, 31), (64, 129)):
                spec = MoeSpec(num_experts=2, hidden_size=hidden, intermediate_size=inner)
                self.check(device, spec, weight_format, random_pairs(spec, 3, k=3))

    def test_activations(self, activation: Activation, has_bias: bool) -> None:
        """Every activation, gated or not, with biases and without."""
        spec = replace(SPEC, activation=activation, has_bias=has_bias)
        with self.open() as device:
            for weight_format in self._one_of_each_element():
                self.check(device, spec, weight_format, random_pairs(spec, 9))

    def test_repeated_experts_and_foreign_pairs(self, weight_format: WeightFormat) -> None:
        """An expert may stand twice in a row; -1 adds nothing, whatever its weight."""
        experts = random_layer(SPEC)
        ids = torch.tensor([[1, 1, 3], [-1, -1, -1], [0, -1, 0], [-1, 3, 3]])
        weights = torch.tensor([[0.5, 0.25, 1], [1, 1, 1], [0, 1e30, -2], [1e30, 0.5, -0.5]])
        pairs = Pairs(random_pairs(SPEC, 4).hidden, ids, weights)
        with self.open() as device:
            kernel = self.accurate_kernel(device, SPEC, weight_format)
            for index in (0, 1, 3):  # 2 is never asked for: it need not be resident
                kernel.load(index, experts[index])
            got = self.compute(kernel, pairs)
            self.check_kernel(kernel, weight_format, experts, pairs, got)
            assert bool((got[1] == 0).all()), "a row of foreign pairs must be exactly 0"

    def test_more_experts_per_token_than_there_are(self) -> None:
        """K may exceed E."""
        with self.open() as device:
            pairs = random_pairs(SPEC, 3, k=2 * SPEC.num_experts + 1)
            self.check(device, SPEC, self.computed_formats()[0], pairs)

    def test_any_strides_and_types_of_arguments(self) -> None:
        """Hidden states may be a view; ids int32 or int64; weights of any floating type."""
        weight_format = self.computed_formats()[0]
        experts = random_layer(SPEC)
        plain = random_pairs(SPEC, 6)
        with self.open() as device:
            kernel = self.accurate_kernel(device, SPEC, weight_format)
            for index, weights in experts.items():
                kernel.load(index, weights)
            for ids in (torch.int32, torch.int64):
                for floating in (torch.float32, torch.bfloat16, torch.float16):
                    pairs = Pairs(
                        plain.hidden.T.contiguous().T,
                        plain.expert_ids.to(ids),
                        plain.weights[:, :1].expand(-1, 2).to(floating),
                    )
                    self.check_kernel(kernel, weight_format, experts, pairs)

    def test_strided_weights(self, weight_format: WeightFormat) -> None:
        """Transposed and interleaved checkpoints come as views, and give the same bits."""
        plain = random_layer(SPEC)[0]
        gate, up, down = (_dense(part) for part in (plain.gate, plain.up, plain.down))
        fused = torch.stack([gate, up], dim=1).flatten(0, 1).T.contiguous()
        strided = ExpertWeights(gate=fused.T[0::2], up=fused.T[1::2], down=down.T.contiguous().T)
        self._same_bits(weight_format, plain, strided)

    def test_types_of_dense_weights(self, weight_format: WeightFormat) -> None:
        """float16, bfloat16 and float32 weights of the same values give the same bits."""
        plain = random_layer(SPEC)[0]
        parts = [_dense(part).bfloat16() for part in (plain.gate, plain.up, plain.down)]
        narrow = [part.where(part.abs() > 2e-4, 0) for part in parts]  # exact in float16 too
        first, *others = (
            ExpertWeights(gate=gate.to(dtype), up=up.to(dtype), down=down.to(dtype))
            for dtype in (torch.float32, torch.bfloat16, torch.float16)
            for gate, up, down in [narrow]
        )
        for other in others:
            self._same_bits(weight_format, first, other)

    def test_quantized_weights(self, weight_format: WeightFormat) -> None:
        """Quantised before or by ``load``: the same bits."""
        plain = random_layer(SPEC)[0]
        gate, up, down = (
            weight_format.quantize(_dense(part)) for part in (plain.gate, plain.up, plain.down)
        )
        self._same_bits(weight_format, plain, ExpertWeights(gate=gate, up=up, down=down))

    def _same_bits(
        self, weight_format: WeightFormat, first: ExpertWeights, second: ExpertWeights
    ) -> None:
        pairs = random_pairs(SPEC, 3)
        outputs = []
        with self.open() as device:
            kernel = device.expert_kernel(SPEC, weight_format.descriptor)
            for weights in (first, second):
                kernel.load(1, weights)
                ids = torch.ones_like(pairs.expert_ids)
                outputs.append(self.compute(kernel, replace(pairs, expert_ids=ids)))
        check_shape(outputs[0], pairs)
        assert torch.equal(*outputs), "the same weights must give the same bits"

    def _one_of_each_element(self) -> list[WeightFormat]:
        found: dict[Element, WeightFormat] = {}
        for weight_format in self.computed_formats():
            found.setdefault(weight_format.descriptor.element, weight_format)
        return list(found.values())


def _dense(part: torch.Tensor | QuantizedTensor | None) -> torch.Tensor:
    assert isinstance(part, torch.Tensor)
    return part
