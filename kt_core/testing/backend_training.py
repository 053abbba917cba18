"""The gradients of ``BackendContract``, against the float64 reference."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

from kt_core.errors import UnsupportedTrainingError
from kt_core.interfaces import (
    ExpertDevice,
    ExpertGradients,
    ExpertKernel,
    LoraWeights,
    WeightFormat,
)
from kt_core.testing import backward_reference, reference
from kt_core.testing.backend_harness import (
    SPEC,
    BackendHarness,
    Pairs,
    is_within,
    precisions,
    random_layer,
    random_pairs,
    worst_of,
)
from kt_core.testing.common import refuses
from kt_core.types import Activation, ActivationPrecision, MoeSpec

RANKS = {"gate": 3, "up": 8, "down": 17}


def random_lora(
    spec: MoeSpec, dtype: torch.dtype = torch.float32, projections: str = "gate up down"
) -> LoraWeights:
    """Make LoRA matrices whose additions are about as large as what they are added to."""
    generator = torch.Generator().manual_seed(5)
    hidden, inner = spec.hidden_size, spec.intermediate_size
    sizes = {"gate": (hidden, inner), "up": (hidden, inner), "down": (inner, hidden)}
    found: dict[str, Any] = {}
    for name in projections.split():
        if name == "gate" and not spec.activation.is_gated:
            continue
        (inputs, outputs), rank = sizes[name], RANKS[name]
        a = torch.randn(spec.num_experts, rank, inputs, generator=generator)
        b = torch.randn(spec.num_experts, outputs, rank, generator=generator)
        found |= {f"{name}_a": (0.1 * a).to(dtype), f"{name}_b": (0.3 * b).to(dtype)}
    return LoraWeights(scale=0.5, **found)


def check_gradients(
    got: ExpertGradients, want: dict[str, backward_reference.Bounded], what: object
) -> None:
    """Compare every gradient with its bound."""
    found = {"hidden": got.hidden, "weights": got.weights}
    if got.lora is not None:
        found |= reference.lora_matrices(got.lora)
    assert found.keys() == want.keys()
    for name, bounded in want.items():
        grad = found[name].cpu()
        assert grad.shape == bounded.value.shape
        flat = (grad.flatten(0, -2), bounded.value.flatten(0, -2), bounded.error.flatten(0, -2))
        assert is_within(*flat), f"{what}, gradient of {name}: {worst_of(*flat)}"


class BackendTraining(BackendHarness):
    """Part of ``BackendContract``; skips where the device does not train."""

    def test_says_whether_it_trains(self, weight_format: WeightFormat) -> None:
        """A kernel agrees with its device, and one that does not train says so when asked."""
        with self.open() as device:
            kernel = device.expert_kernel(SPEC, weight_format.descriptor)
            assert kernel.trains == device.capabilities.trains
            if kernel.trains:
                return
            hidden, ids, weights = _arguments(random_pairs(SPEC, 2))
            with pytest.raises(UnsupportedTrainingError, match=weight_format.descriptor.name):
                kernel.submit_training(hidden, ids, weights)
            with pytest.raises(UnsupportedTrainingError, match=weight_format.descriptor.name):
                kernel.backward(hidden, ids, weights, hidden)

    def test_gradients_match_the_reference(self, weight_format: WeightFormat, tokens: int) -> None:
        """Every format and precision."""
        with self._training() as device:
            self.check_training(device, SPEC, weight_format, random_pairs(SPEC, tokens))

    def test_gradients_of_activations(self, activation: Activation, has_bias: bool) -> None:
        """Every activation, gated or not, with biases and without."""
        spec = replace(SPEC, activation=activation, has_bias=has_bias)
        weight_format = self.computed_formats()[0]
        with self._training() as device:
            for lora in (None, random_lora(spec)):
                self.check_training(device, spec, weight_format, random_pairs(spec, 9), lora)

    def test_gradients_of_odd_shapes(self, weight_format: WeightFormat) -> None:
        """Sizes of one, and on both sides of a vector register."""
        with self._training() as device:
            for hidden, inner in ((1, 1), (15, 17), (33, 31), (64, 129)):
                spec = MoeSpec(num_experts=2, hidden_size=hidden, intermediate_size=inner)
                lora = random_lora(spec)
                self.check_training(device, spec, weight_format, random_pairs(spec, 3, k=3), lora)

    def test_lora(self, weight_format: WeightFormat) -> None:
        """Any subset of the projections, of both types."""
        pairs = random_pairs(SPEC, 11)
        with self._training() as device:
            for projections, dtype in (
                ("gate up down", torch.float32),
                ("down", torch.bfloat16),
                ("gate", torch.float32),
                ("up down", torch.bfloat16),
            ):
                lora = random_lora(SPEC, dtype, projections)
                self.check_training(device, SPEC, weight_format, pairs, lora)

    def test_types_of_gradients(self) -> None:
        """A gradient has the type of what it is the gradient of."""
        with self._training() as device:
            kernel = self._trainable(device)
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                pairs = replace(
                    random_pairs(SPEC, 3, dtype=dtype), weights=torch.rand(3, 2).bfloat16()
                )
                lora = random_lora(SPEC, torch.bfloat16)
                got = self.gradients(kernel, pairs, torch.ones_like(pairs.hidden), lora)
                assert got.hidden.dtype is dtype
                assert got.weights.dtype is torch.bfloat16
                assert got.lora is not None
                for matrix in reference.lora_matrices(got.lora).values():
                    assert matrix.dtype is torch.bfloat16

    def test_gradients_of_repeated_experts_and_foreign_pairs(self) -> None:
        """An expert may stand twice in a row; -1 has no gradient, whatever its weight."""
        ids = torch.tensor([[1, 1, 3], [-1, -1, -1], [0, -1, 0], [-1, 3, 3]])
        weights = torch.tensor([[0.5, 0.25, 1], [1, 1, 1], [0, 1e30, -2], [1e30, 0.5, -0.5]])
        pairs = Pairs(random_pairs(SPEC, 4).hidden, ids, weights)
        with self._training() as device:
            self.check_training(device, SPEC, self.computed_formats()[0], pairs)
            got = self.gradients(self._trainable(device), pairs, pairs.hidden)
            assert bool((got.hidden[1] == 0).all())
            assert bool((got.weights.cpu()[ids == -1] == 0).all())

    def test_nothing_is_kept_between_passes(self) -> None:
        """Forward any number of times, and backward twice, of other calls between: same bits."""
        with self._training() as device:
            kernel, lora = self._trainable(device), random_lora(SPEC)
            first, other = random_pairs(SPEC, 17), random_pairs(SPEC, 30, seed=1)
            outputs, grads = [], []
            for _ in range(2):
                outputs.append(self.forward(kernel, first, lora))
                self.forward(kernel, other)
                self.gradients(kernel, other, other.hidden)
                grads.append(self.gradients(kernel, first, first.hidden, lora))
            assert torch.equal(*outputs)
            assert torch.equal(grads[0].hidden, grads[1].hidden)
            assert torch.equal(grads[0].weights, grads[1].weights)

    def test_training_refuses_what_does_not_fit(self) -> None:
        """The gradient of the output, and LoRA matrices."""
        pairs, lora = random_pairs(SPEC, 2), random_lora(SPEC)
        with self._training() as device:
            kernel = self._trainable(device)
            for what, grad in {
                "a gradient one token short": pairs.hidden[1:],
                "a gradient of another type": pairs.hidden.bfloat16(),
            }.items():
                with refuses(what):
                    self.gradients(kernel, pairs, grad)
            assert lora.up_a is not None
            for what, bad in {
                "A without B": replace(lora, up_b=None),
                "A transposed": replace(lora, up_a=lora.up_a.mT),
                "A of one expert less": replace(lora, up_a=lora.up_a[1:]),
                "A of another rank": replace(lora, up_a=lora.up_a[:, 1:]),
                "A of float64": replace(lora, up_a=lora.up_a.double()),
            }.items():
                with refuses(what):
                    self.forward(kernel, pairs, bad)
                with refuses(what):
                    self.gradients(kernel, pairs, pairs.hidden, bad)

    @contextmanager
    def _training(self) -> Iterator[ExpertDevice]:
        with self.open() as device:
            if not device.capabilities.trains:
                pytest.skip(f"device {device.info.name!r} does not train")
            yield device

    def _trainable(self, device: ExpertDevice) -> ExpertKernel:
        kernel = device.expert_kernel(SPEC, self.computed_formats()[0].descriptor)
        for index, weights in random_layer(SPEC).items():
            kernel.load(index, weights)
        return kernel

    def forward(
        self, kernel: ExpertKernel, pairs: Pairs, lora: LoraWeights | None = None
    ) -> torch.Tensor:
        """Run the forward pass of training where the device is."""
        hidden, ids, weights = (t.to(self._torch_device) for t in _arguments(pairs))
        return kernel.submit_training(hidden, ids, weights, self._moved(lora)).wait().cpu()

    def gradients(
        self,
        kernel: ExpertKernel,
        pairs: Pairs,
        grad_out: torch.Tensor,
        lora: LoraWeights | None = None,
    ) -> ExpertGradients:
        """Run the backward pass where the device is."""
        hidden, ids, weights = (t.to(self._torch_device) for t in _arguments(pairs))
        grad_out = grad_out.to(self._torch_device)
        return kernel.backward(hidden, ids, weights, grad_out, self._moved(lora))

    def check_training(
        self,
        device: ExpertDevice,
        spec: MoeSpec,
        weight_format: WeightFormat,
        pairs: Pairs,
        lora: LoraWeights | None = None,
    ) -> None:
        """Compare all precisions that can be asked for by name with the reference."""
        experts = random_layer(spec)
        layer = reference.layer(spec, weight_format, experts)
        generator = torch.Generator().manual_seed(3)
        grad_out = torch.randn(pairs.hidden.shape, generator=generator).to(pairs.hidden.dtype)
        for precision in precisions(device, spec, weight_format):
            if precision is ActivationPrecision.AUTO:
                continue
            kernel = device.expert_kernel(spec, weight_format.descriptor, precision=precision)
            for index, weights in experts.items():
                kernel.load(index, weights)
            arguments = (layer, *_arguments(pairs))
            out = backward_reference.forward(*arguments, precision, lora)
            got_out = self.forward(kernel, pairs, lora)
            assert got_out.dtype is pairs.hidden.dtype
            within = (got_out, out.value, out.error)
            assert is_within(*within), f"{precision}, forward: {worst_of(*within)}"
            want = backward_reference.backward(*arguments, grad_out, precision, lora)
            got = self.gradients(kernel, pairs, grad_out, lora)
            check_gradients(got, want, precision)

    def _moved(self, lora: LoraWeights | None) -> LoraWeights | None:
        if lora is None:
            return None
        matrices = reference.lora_matrices(lora)
        moved: dict[str, Any] = {n: m.to(self._torch_device) for n, m in matrices.items()}
        return replace(lora, **moved)


def _arguments(pairs: Pairs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return pairs.hidden, pairs.expert_ids, pairs.weights
