"""Our backends keep the contract that outside ones must keep; and every test of it can fail."""

from __future__ import annotations

import inspect
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

from kt_core import plugins
from kt_core.interfaces import (
    Backend,
    ExpertDevice,
    ExpertGradients,
    ExpertKernel,
    ExpertWeights,
    QuantizedTensor,
    Ticket,
)
from kt_core.packed import ExpertLayout
from kt_core.quant import BUILT_IN_FORMATS
from kt_core.testing import (
    ACTIVATIONS,
    BackendContract,
    FinishedTicket,
    ReferenceBackend,
    ReferenceDevice,
    ReferenceKernel,
)
from kt_core.testing.backend_dense import BackendDense
from kt_core.types import (
    SILU,
    ActivationKind,
    ActivationPrecision,
    Capabilities,
    DeviceInfo,
    Format,
    MoeSpec,
)

REGISTRY = plugins.load()


class TestCpu(BackendContract):
    backend = REGISTRY.backends.get("cpu")
    formats = tuple(REGISTRY.formats)


class TestReference(BackendContract):
    # It computes what the reference says: sizes of groups have nothing more to show here.
    formats = tuple(f for f in BUILT_IN_FORMATS if f.descriptor.group_size not in (64, 128))
    backend = ReferenceBackend(formats)


def test_every_registered_backend_is_tested_here() -> None:
    # Others may be installed beside ours; theirs to test.
    ours = {n for n in REGISTRY.backends.names() if REGISTRY.backends.owner(n) in ("cpu",)}
    assert ours == {TestCpu.backend.name}


def test_every_activation_is_tested() -> None:
    assert {activation.kind for activation in ACTIVATIONS} == set(ActivationKind)


# From here on: backends that are broken on purpose, each in one way, and the test that must notice.


class IgnoresRoutingWeights(ReferenceKernel):
    def submit(self, hidden: Any, expert_ids: Any, weights: Any) -> Ticket:
        return super().submit(hidden, expert_ids, torch.ones_like(weights))


class DropsTheLastExpert(ReferenceKernel):
    def submit(self, hidden: Any, expert_ids: Any, weights: Any) -> Ticket:
        last = self.spec.num_experts - 1
        return super().submit(hidden, expert_ids.where(expert_ids != last, -1), weights)


class TakesForeignPairsForTheLastExpert(ReferenceKernel):
    def submit(self, hidden: Any, expert_ids: Any, weights: Any) -> Ticket:
        last = self.spec.num_experts - 1
        return super().submit(hidden, expert_ids.where(expert_ids >= 0, last), weights)


class CountsNoMoreExpertsThanThereAre(ReferenceKernel):
    def submit(self, hidden: Any, expert_ids: Any, weights: Any) -> Ticket:
        k = self.spec.num_experts
        return super().submit(hidden, expert_ids[:, :k], weights[:, :k])


class KnowsSiluOnly(ReferenceKernel):
    def __init__(self, spec: MoeSpec, *rest: Any) -> None:
        super().__init__(replace(spec, activation=SILU), *rest)


class LosesTheLastOddOutput(ReferenceKernel):
    def submit(self, hidden: Any, expert_ids: Any, weights: Any) -> Ticket:
        out = super().submit(hidden, expert_ids, weights).wait()
        out[:, out.shape[1] // 16 * 16 :] = 0
        return FinishedTicket(out)


class AnswersInFloat32(ReferenceKernel):
    def submit(self, hidden: Any, expert_ids: Any, weights: Any) -> Ticket:
        return FinishedTicket(super().submit(hidden, expert_ids, weights).wait().float())


class TakesHiddenStatesForContiguous(ReferenceKernel):
    def submit(self, hidden: Any, expert_ids: Any, weights: Any) -> Ticket:
        return super().submit(_as_if_contiguous(hidden), expert_ids, weights)


class TakesWeightsForContiguous(ReferenceKernel):
    def load(self, expert: int, weights: ExpertWeights) -> None:
        super().load(expert, replace(weights, up=_as_if_contiguous(weights.up)))


class TakesFloat16ForBfloat16(ReferenceKernel):
    def load(self, expert: int, weights: ExpertWeights) -> None:
        up = weights.up
        if isinstance(up, torch.Tensor) and up.dtype is torch.float16:
            weights = replace(weights, up=up.view(torch.bfloat16))
        super().load(expert, weights)


class ReadsCodesFromTheWrongEnd(ReferenceKernel):
    def load(self, expert: int, weights: ExpertWeights) -> None:
        up = weights.up
        if isinstance(up, QuantizedTensor):
            weights = replace(weights, up=replace(up, codes=up.codes.flip(1)))
        super().load(expert, weights)


class LoadsOnce(ReferenceKernel):
    def load(self, expert: int, weights: ExpertWeights) -> None:
        if expert not in self.resident():
            super().load(expert, weights)


class NeverUnloads(ReferenceKernel):
    def unload(self, expert: int) -> None:
        pass


class CallsEveryExpertResident(ReferenceKernel):
    def resident(self) -> frozenset[int]:
        return frozenset(range(self.spec.num_experts))


class ClaimsTooFewBytes(ReferenceKernel):
    @property
    def bytes_per_expert(self) -> int:
        return super().bytes_per_expert - 1


class LoadsAnything(ReferenceKernel):
    """Skips every check, and holds whatever it is given."""

    def load(self, expert: int, weights: ExpertWeights) -> None:
        self._experts[expert] = {}


class SharesScratchBetweenThreads(ReferenceKernel):
    _scratch: ExpertWeights

    def load(self, expert: int, weights: ExpertWeights) -> None:
        self._scratch = weights
        time.sleep(0.001)
        super().load(expert, self._scratch)


class KeepsTheTensors(ReferenceKernel):
    """Packs when it computes, not when it loads."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._kept: dict[int, ExpertWeights] = {}

    def load(self, expert: int, weights: ExpertWeights) -> None:
        self._kept[expert] = weights

    def submit(self, hidden: Any, expert_ids: Any, weights: Any) -> Ticket:
        for expert, kept in self._kept.items():
            super().load(expert, kept)
        return super().submit(hidden, expert_ids, weights)


class SaysItMovesNothing(ReferenceKernel):
    """And does all the same."""

    moves_packed = False


class PacksOutputsInAnotherOrder(ReferenceKernel):
    def packed(self, expert: int) -> torch.Tensor:
        return super().packed(expert).flip(0)


class KeepsThePackedBytes(ReferenceKernel):
    def packed(self, expert: int) -> torch.Tensor:
        return self._packed[expert]

    def load_packed(self, expert: int, packed: torch.Tensor) -> None:
        super().load_packed(expert, packed)
        self._packed[expert] = packed


class LoadsPackedOnce(ReferenceKernel):
    def load_packed(self, expert: int, packed: torch.Tensor) -> None:
        if expert not in self.resident():
            super().load_packed(expert, packed)


class LoadsAnyBytes(ReferenceKernel):
    def load_packed(self, expert: int, packed: torch.Tensor) -> None:
        self._packed[expert] = packed


class GathersInAscendingOrder(ReferenceKernel):
    def gather_packed(self, experts: Sequence[int], out: torch.Tensor) -> None:
        super().gather_packed(sorted(experts), out)


class GathersWhereverItIsTold(ReferenceKernel):
    def gather_packed(self, experts: Sequence[int], out: torch.Tensor) -> None:
        for packed in map(self._packed.get, experts):
            if packed is not None and out.numel() >= packed.numel():
                out.flatten()[: packed.numel()] = packed


class LoadsTogetherInAscendingOrder(ReferenceKernel):
    def load_packed_together(self, experts: Sequence[int], packed: torch.Tensor) -> None:
        super().load_packed_together(sorted(experts), packed)


class UnloadsWhatCameTogether(ReferenceKernel):
    together: Sequence[int] = ()

    def load_packed_together(self, experts: Sequence[int], packed: torch.Tensor) -> None:
        super().load_packed_together(experts, packed)
        self.together = experts

    def unload(self, expert: int) -> None:
        for one in self.together if expert in self.together else (expert,):
            super().unload(one)


class LoadsSomeBeforeItChecks(ReferenceKernel):
    def load_packed_together(self, experts: Sequence[int], packed: torch.Tensor) -> None:
        parts = packed.split(ExpertLayout.of(self.spec, self.weight_format).size_bytes)
        for expert, part in zip(experts, parts, strict=True):
            self.load_packed(expert, part)


class UnloadsAllButOne(ReferenceKernel):
    def unload_all(self) -> None:
        for expert in sorted(self.resident())[1:]:
            self.unload(expert)


class ChecksNothing(ReferenceKernel):
    def submit(self, hidden: Any, expert_ids: Any, weights: Any) -> Ticket:
        return FinishedTicket(torch.zeros_like(hidden))


class ScalesHiddenStatesInPlace(ReferenceKernel):
    def submit(self, hidden: Any, expert_ids: Any, weights: Any) -> Ticket:
        ticket = super().submit(hidden, expert_ids, weights)
        hidden *= 2
        return ticket


class ReusesItsOutput(ReferenceKernel):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._buffer = torch.zeros(64, self.spec.hidden_size)

    def submit(self, hidden: Any, expert_ids: Any, weights: Any) -> Ticket:
        out = self._buffer[: len(hidden)]
        out.copy_(super().submit(hidden, expert_ids, weights).wait())
        return FinishedTicket(out)


@dataclass
class LazyTicket(Ticket):
    compute: Callable[[], torch.Tensor]

    def wait(self) -> torch.Tensor:
        return self.compute()


class DiesBeforeItsTicket(ReferenceKernel):
    def submit(self, hidden: Any, expert_ids: Any, weights: Any) -> Ticket:
        kernel = weakref.ref(self)

        def compute() -> torch.Tensor:
            alive = kernel()
            assert alive is not None, "the kernel is gone"
            return ReferenceKernel.submit(alive, hidden, expert_ids, weights).wait()

        return LazyTicket(compute)


class AddsWhatNobodyWaitedFor(ReferenceKernel):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._pending: list[torch.Tensor] = []

    def submit(self, hidden: Any, expert_ids: Any, weights: Any) -> Ticket:
        self._pending.append(super().submit(hidden, expert_ids, weights).wait())

        def compute() -> torch.Tensor:
            out = sum(self._pending, torch.zeros_like(hidden))
            self._pending.clear()
            return out

        return LazyTicket(compute)


def _as_if_contiguous(tensor: Any) -> torch.Tensor:
    strides = (tensor.shape[1], 1)
    return torch.as_strided(tensor, tensor.shape, strides, tensor.storage_offset())


class BrokenBackend(ReferenceBackend):
    """The reference with other kernels."""

    def __init__(self, kernel_class: type[ReferenceKernel]) -> None:
        super().__init__()
        self._kernel_class = kernel_class

    def open(self, device: str, *, threads: int | None = None) -> ExpertDevice:
        opened = super().open(device, threads=threads)
        assert isinstance(opened, ReferenceDevice)
        opened.kernel_class = self._kernel_class
        return opened


class HasAnOddName(ReferenceBackend):
    name = "Reference 2"


class IsUnavailableWithoutAWord(ReferenceBackend):
    def why_unavailable(self) -> str | None:
        return ""


class HasOneNameForTwoDevices(ReferenceBackend):
    def devices(self) -> Sequence[DeviceInfo]:
        return [*super().devices(), *super().devices()]


class ComputesAFormatNobodyKnows(ReferenceBackend):
    def capabilities(self, device: str) -> Capabilities:
        return Capabilities(formats=frozenset({"int5"}))


class TakesMoreThreadsThanItIsGiven(ReferenceBackend):
    def open(self, device: str, *, threads: int | None = None) -> ExpertDevice:
        opened = super().open(device)
        opened.threads = 64
        return opened


class SharesOneDevice(ReferenceBackend):
    """Closing any closes all."""

    def __init__(self) -> None:
        super().__init__()
        self._is_closed = False

    def open(self, device: str, *, threads: int | None = None) -> ExpertDevice:
        shared = self

        class Shared(ReferenceDevice):
            def expert_kernel(
                self,
                spec: MoeSpec,
                weight_format: Format,
                *,
                precision: ActivationPrecision = ActivationPrecision.AUTO,
            ) -> ExpertKernel:
                assert not shared._is_closed, "the device is closed"
                return super().expert_kernel(spec, weight_format, precision=precision)

            def close(self) -> None:
                shared._is_closed = True

        return Shared(self.devices()[0], self.capabilities(device), self._formats)


class ComputesMoreThanItSays(ReferenceBackend):
    def open(self, device: str, *, threads: int | None = None) -> ExpertDevice:
        class Any8(ReferenceDevice):
            def expert_kernel(
                self,
                spec: MoeSpec,
                weight_format: Format,
                *,
                precision: ActivationPrecision = ActivationPrecision.AUTO,
            ) -> ExpertKernel:
                return ReferenceKernel(spec, BUILT_IN_FORMATS[1], precision)

        return Any8(self.devices()[0], self.capabilities(device), self._formats)


class TrainsAgainstItsWord(ReferenceKernel):
    trains = False


class ForgetsTheRoutingWeight(ReferenceKernel):
    def backward(self, hidden: Any, expert_ids: Any, weights: Any, *rest: Any) -> ExpertGradients:
        return super().backward(hidden, expert_ids, torch.ones_like(weights), *rest)


class DifferentiatesSiluOnly(ReferenceKernel):
    def __init__(self, spec: MoeSpec, *rest: Any) -> None:
        super().__init__(replace(spec, activation=replace(spec.activation, kind=SILU.kind)), *rest)


class LosesTheLastGradient(ReferenceKernel):
    def backward(self, *arguments: Any) -> ExpertGradients:
        found = super().backward(*arguments)
        if found.hidden.shape[1] % 2:
            found.hidden[:, -1] = 0
        return found


class IgnoresLora(ReferenceKernel):
    def submit_training(self, *arguments: Any) -> Ticket:
        return super().submit_training(*arguments[:3])


class GivesFloat32Gradients(ReferenceKernel):
    def backward(self, *arguments: Any) -> ExpertGradients:
        found = super().backward(*arguments)
        return replace(found, hidden=found.hidden.float())


class GivesForeignPairsAGradient(ReferenceKernel):
    def backward(self, *arguments: Any) -> ExpertGradients:
        found = super().backward(*arguments)
        found.weights[arguments[1] == -1] = 1e-3
        return found


class AddsToTheLastGradient(ReferenceKernel):
    before: torch.Tensor | float = 0.0

    def backward(self, *arguments: Any) -> ExpertGradients:
        found = super().backward(*arguments)
        before = self.before
        self.before = before + found.weights.sum()
        return replace(found, hidden=found.hidden + before)


FORMATS = {f.descriptor.name: f for f in BUILT_IN_FORMATS}
RELU = next(a for a in ACTIVATIONS if a.kind is ActivationKind.RELU)


@dataclass
class Case:
    test: str
    broken: type[ReferenceKernel] | type[Backend]
    arguments: dict[str, Any] = field(default_factory=dict)


INT8 = {"weight_format": FORMATS["int8-g32"]}
CASES = [
    Case("test_name", HasAnOddName),
    Case("test_why_unavailable", IsUnavailableWithoutAWord),
    Case("test_devices", HasOneNameForTwoDevices),
    Case("test_capabilities", ComputesAFormatNobodyKnows),
    Case("test_open", TakesMoreThreadsThanItIsGiven),
    Case("test_two_devices_at_once", SharesOneDevice),
    Case("test_refuses_formats_it_does_not_compute", ComputesMoreThanItSays),
    Case("test_matches_the_reference", IgnoresRoutingWeights, {**INT8, "tokens": 3}),
    Case("test_matches_the_reference", DropsTheLastExpert, {**INT8, "tokens": 17}),
    Case("test_says_whether_it_trains", TrainsAgainstItsWord, INT8),
    Case("test_gradients_match_the_reference", ForgetsTheRoutingWeight, {**INT8, "tokens": 3}),
    Case(
        "test_gradients_of_activations",
        DifferentiatesSiluOnly,
        {"activation": RELU, "has_bias": False},
    ),
    Case("test_gradients_of_odd_shapes", LosesTheLastGradient, INT8),
    Case("test_lora", IgnoresLora, INT8),
    Case("test_types_of_gradients", GivesFloat32Gradients),
    Case("test_gradients_of_repeated_experts_and_foreign_pairs", GivesForeignPairsAGradient),
    Case("test_nothing_is_kept_between_passes", AddsToTheLastGradient),
    Case("test_training_refuses_what_does_not_fit", IgnoresLora),
    Case("test_types_of_hidden_states", AnswersInFloat32, INT8),
    Case("test_odd_shapes", LosesTheLastOddOutput, INT8),
    Case("test_activations", KnowsSiluOnly, {"activation": RELU, "has_bias": False}),
    Case("test_repeated_experts_and_foreign_pairs", TakesForeignPairsForTheLastExpert, INT8),
    Case("test_more_experts_per_token_than_there_are", CountsNoMoreExpertsThanThereAre),
    Case("test_any_strides_and_types_of_arguments", TakesHiddenStatesForContiguous),
    Case("test_strided_weights", TakesWeightsForContiguous, INT8),
    Case("test_types_of_dense_weights", TakesFloat16ForBfloat16, INT8),
    Case("test_quantized_weights", ReadsCodesFromTheWrongEnd, INT8),
    Case("test_load_replaces", LoadsOnce, INT8),
    Case("test_resident_and_unload", NeverUnloads),
    Case("test_resident_and_unload", CallsEveryExpertResident),
    Case("test_resident_and_unload", UnloadsAllButOne),
    Case("test_bytes", ClaimsTooFewBytes, INT8),
    Case("test_load_refuses_what_does_not_fit", LoadsAnything, INT8),
    Case("test_load_refuses_numbers_that_are_not_finite", LoadsAnything, INT8),
    Case("test_load_refuses_other_formats", LoadsAnything, INT8),
    Case("test_loads_from_several_threads", SharesScratchBetweenThreads, INT8),
    Case("test_load_neither_keeps_nor_changes_the_tensors", KeepsTheTensors, INT8),
    Case("test_packed_bytes", PacksOutputsInAnotherOrder, INT8),
    Case("test_packed_bytes", SaysItMovesNothing, INT8),
    Case("test_load_packed", KeepsThePackedBytes, INT8),
    Case("test_load_packed", LoadsPackedOnce, INT8),
    Case("test_load_packed_refuses_what_does_not_fit", LoadsAnyBytes, INT8),
    Case("test_gather_packed", GathersInAscendingOrder, INT8),
    Case("test_gather_packed_refuses_what_does_not_fit", GathersWhereverItIsTold, INT8),
    Case("test_load_packed_together", LoadsTogetherInAscendingOrder, INT8),
    Case("test_load_packed_together", UnloadsWhatCameTogether, INT8),
    Case("test_load_packed_together_refuses_what_does_not_fit", LoadsSomeBeforeItChecks, INT8),
    Case("test_submit_refuses_what_does_not_fit", ChecksNothing),
    Case("test_ids_that_the_kernel_does_not_hold", ChecksNothing),
    Case("test_submit_does_not_change_its_arguments", ScalesHiddenStatesInPlace),
    Case("test_several_tickets_at_once", ReusesItsOutput),
    Case("test_a_ticket_keeps_what_it_reads_alive", DiesBeforeItsTicket),
    Case("test_tickets_may_be_dropped", AddsWhatNobodyWaitedFor),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.broken.__name__)
def test_what_is_broken_is_noticed(case: Case) -> None:
    if issubclass(case.broken, ReferenceKernel):
        backend: Backend = BrokenBackend(case.broken)
    else:
        backend = case.broken()
    suite = BackendContract()
    suite.backend = backend
    with pytest.raises(AssertionError):
        getattr(suite, case.test)(**case.arguments)
    suite.backend = ReferenceBackend()
    getattr(suite, case.test)(**case.arguments)  # and not when nothing is


def test_every_test_of_the_contract_can_fail() -> None:
    """Those of dense layers: tests/contract/test_dense.py."""
    tests = {n for n, _ in inspect.getmembers(BackendContract, inspect.isfunction)}
    dense = {n for n, _ in inspect.getmembers(BackendDense, inspect.isfunction)}
    assert {case.test for case in CASES} == {n for n in tests - dense if n.startswith("test_")}
