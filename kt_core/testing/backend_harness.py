"""What the tests of ``BackendContract`` share: the device under test, small layers, comparisons."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from kt_core.errors import BackendUnavailableError, UnsupportedFormatError
from kt_core.interfaces import (
    Backend,
    ExpertDevice,
    ExpertKernel,
    ExpertWeights,
    Ticket,
    WeightFormat,
)
from kt_core.quant import BUILT_IN_FORMATS
from kt_core.testing import reference
from kt_core.testing.common import OneTorchThread
from kt_core.types import (
    Activation,
    ActivationKind,
    ActivationPrecision,
    DeviceInfo,
    MoeSpec,
)

# Neither size is a multiple of a group: the last group of every format is partial.
SPEC = MoeSpec(num_experts=4, hidden_size=160, intermediate_size=72)

ACTIVATIONS: tuple[Activation, ...] = (
    *(
        Activation(kind=kind, is_gated=is_gated)
        for kind in list(ActivationKind)[:5]
        for is_gated in (True, False)
    ),
    # Limits small enough that the toy layers reach them.
    Activation(kind=ActivationKind.SWIGLU_CLAMP, limit=0.5),
    Activation(kind=ActivationKind.SWIGLU_CLAMP_AFTER, limit=0.25),
    Activation(kind=ActivationKind.SWIGLU_CLAMP_AFTER),
    Activation(kind=ActivationKind.SWIGLU_OAI, alpha=1.702, limit=0.75),
    Activation(kind=ActivationKind.SWIGLU_SOFTCAP, limit=0.5, up_limit=0.75),
)
"""Every activation there is, with parameters that matter."""


@dataclass(frozen=True, slots=True)
class Pairs:
    """Arguments of ``ExpertKernel.submit``, on the host."""

    hidden: torch.Tensor
    expert_ids: torch.Tensor
    weights: torch.Tensor


def random_layer(spec: MoeSpec, seed: int = 0) -> dict[int, ExpertWeights]:
    """Make the weights of all experts."""
    generator = torch.Generator().manual_seed(seed)
    return {e: reference.random_weights(spec, generator) for e in range(spec.num_experts)}


def random_pairs(
    spec: MoeSpec,
    tokens: int,
    k: int = 2,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Pairs:
    """Make hidden states, random experts for them (some twice in a row), and weights."""
    generator = torch.Generator().manual_seed(seed)
    return Pairs(
        torch.randn(tokens, spec.hidden_size, generator=generator).to(dtype),
        torch.randint(0, spec.num_experts, (tokens, k), generator=generator),
        torch.rand(tokens, k, generator=generator) + 0.1,
    )


def is_within(got: torch.Tensor, want: torch.Tensor, allowed: torch.Tensor) -> bool:
    """Whether no element is further off than allowed; NaN is."""
    return bool(((got.double() - want).abs() <= allowed).all())


def worst_of(got: torch.Tensor, want: torch.Tensor, allowed: torch.Tensor) -> str:
    """Describe the element that is furthest out of bounds."""
    ratio = ((got.double() - want).abs() / allowed.clamp_min(1e-300)).nan_to_num(torch.inf)
    token, output = divmod(int(ratio.argmax()), got.shape[1])
    at = (token, output)
    return (
        f"token {token}, output {output}: got {float(got[at])}, want {float(want[at])} "
        f"+- {float(allowed[at]):.3g} ({float(ratio[at]):.3g} times what rounding explains; "
        f"{int((ratio > 1).sum())} of {ratio.numel()} outputs are off)"
    )


class BackendHarness(OneTorchThread):
    """Opens the device under test and feeds it.

    Attributes:
        backend: The backend under test.
        formats: Every format that is registered where the backend runs.
        device: Name of the device to test; None for the backend's first.
    """

    backend: Backend
    formats: Sequence[WeightFormat] = BUILT_IN_FORMATS
    device: str | None = None
    _torch_device: str = "cpu"

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Give each test the values its arguments stand for."""
        values: dict[str, tuple[Callable[[], Sequence[Any]], Callable[[Any], str]]] = {
            "weight_format": (self.computed_formats, lambda f: f.descriptor.name),
            "activation": (lambda: ACTIVATIONS, _activation_id),
            "tokens": (lambda: [0, 1, 3, 17], str),
            "has_bias": (lambda: [False, True], lambda b: "bias" if b else "no_bias"),
        }
        for name, (list_values, name_value) in values.items():
            if name in metafunc.fixturenames:
                metafunc.parametrize(name, list_values(), ids=name_value)

    def computed_formats(self) -> list[WeightFormat]:
        """Return the formats the device says it computes; all, where it cannot be asked."""
        if self.backend.why_unavailable() is not None:
            return list(self.formats)
        try:
            capabilities = self.backend.capabilities(self.info().name)
        except BackendUnavailableError:
            return list(self.formats)
        return [f for f in self.formats if capabilities.computes(f.descriptor)]

    def info(self) -> DeviceInfo:
        """Return the device under test; skip where the backend cannot run."""
        reason = self.backend.why_unavailable()
        if reason is not None:
            pytest.skip(f"backend {self.backend.name!r} cannot run here: {reason}")
        devices = {info.name: info for info in self.backend.devices()}
        assert devices, "why_unavailable() is None, yet there are no devices"
        assert self.device is None or self.device in devices, f"no {self.device!r} in {devices}"
        return devices[self.device or next(iter(devices))]

    def open(self) -> ExpertDevice:
        """Open the device under test with two threads."""
        info = self.info()
        self._torch_device = info.torch_device
        return self.backend.open(info.name, threads=2)

    def submit(self, kernel: ExpertKernel, pairs: Pairs) -> Ticket:
        """Bring copies of the tensors to the device and submit them; only the ticket has them."""
        return kernel.submit(
            *(tensor.to(self._torch_device, copy=True) for tensor in _fields(pairs))
        )

    def compute(self, kernel: ExpertKernel, pairs: Pairs) -> torch.Tensor:
        """Submit, wait, and bring the result to the host."""
        return self.submit(kernel, pairs).wait().cpu()

    def check(
        self,
        device: ExpertDevice,
        spec: MoeSpec,
        weight_format: WeightFormat,
        pairs: Pairs,
        *,
        seed: int = 0,
    ) -> None:
        """Compare all precisions of a format with the reference.

        ``AUTO`` must be one of those that can be asked for by name.
        """
        experts = random_layer(spec, seed)
        layer = reference.layer(spec, weight_format, experts)
        outputs = {}
        for precision in precisions(device, spec, weight_format):
            kernel = device.expert_kernel(spec, weight_format.descriptor, precision=precision)
            for index, weights in experts.items():
                kernel.load(index, weights)
            outputs[precision] = self.compute(kernel, pairs)
        automatic = outputs.pop(ActivationPrecision.AUTO)
        problems = {}
        for precision, got in outputs.items():
            want, allowed = reference.forward(layer, *_fields(pairs), precision)
            check_shape(got, pairs)
            assert is_within(got, want, allowed), f"{precision}: {worst_of(got, want, allowed)}"
            if not is_within(automatic, want, allowed):
                problems[precision] = worst_of(automatic, want, allowed)
        check_shape(automatic, pairs)
        assert len(problems) < len(outputs), f"auto is none of the named precisions: {problems}"

    def check_kernel(
        self,
        kernel: ExpertKernel,
        weight_format: WeightFormat,
        experts: dict[int, ExpertWeights],
        pairs: Pairs,
        got: torch.Tensor | None = None,
    ) -> None:
        """Compare a kernel that holds ``experts`` and was made with ``FLOAT32`` precision."""
        got = self.compute(kernel, pairs) if got is None else got
        check_shape(got, pairs)
        layer = reference.layer(kernel.spec, weight_format, experts)
        want, allowed = reference.forward(layer, *_fields(pairs), ActivationPrecision.FLOAT32)
        assert is_within(got, want, allowed), worst_of(got, want, allowed)

    def accurate_kernel(
        self, device: ExpertDevice, spec: MoeSpec, weight_format: WeightFormat
    ) -> ExpertKernel:
        """Make a kernel with the precision that every backend has: ``FLOAT32``."""
        return device.expert_kernel(
            spec, weight_format.descriptor, precision=ActivationPrecision.FLOAT32
        )


def precisions(
    device: ExpertDevice, spec: MoeSpec, weight_format: WeightFormat
) -> list[ActivationPrecision]:
    """Return what can be asked for; ``AUTO`` and ``FLOAT32`` always can."""
    found = []
    for precision in ActivationPrecision:
        try:
            device.expert_kernel(spec, weight_format.descriptor, precision=precision)
        except UnsupportedFormatError:
            continue
        found.append(precision)
    for needed in (ActivationPrecision.AUTO, ActivationPrecision.FLOAT32):
        assert needed in found, f"{weight_format.descriptor.name} has no precision {needed}"
    return found


def check_shape(got: torch.Tensor, pairs: Pairs) -> None:
    """Fail unless the result is shaped and typed like the hidden states."""
    assert got.shape == pairs.hidden.shape
    assert got.dtype is pairs.hidden.dtype, f"{got.dtype} for hidden states {pairs.hidden.dtype}"


def _fields(pairs: Pairs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return pairs.hidden, pairs.expert_ids, pairs.weights


def _activation_id(activation: Activation) -> str:
    parts = [activation.kind.value if activation.is_gated else f"{activation.kind.value}_ungated"]
    parts += [
        f"{name}={getattr(activation, name):g}"
        for name in ("limit", "up_limit")
        if getattr(activation, name) < float("inf")
    ]
    return "-".join(parts)
