"""The rules of ``BackendContract``: loading and unloading, bad input, tickets, threads."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from typing import Any

import torch

from kt_core.interfaces import ExpertKernel, ExpertWeights, QuantizedTensor, WeightFormat
from kt_core.testing.backend_harness import (
    SPEC,
    BackendHarness,
    Pairs,
    random_layer,
    random_pairs,
)
from kt_core.testing.common import refuses
from kt_core.types import Activation, ActivationKind, MoeSpec


class LoadingRules(BackendHarness):
    """Part of ``BackendContract``: what ``load``, ``unload`` and ``resident`` promise."""

    def test_load_replaces(self, weight_format: WeightFormat) -> None:
        """An expert loaded again is the new one; nothing of the old one is left."""
        experts, pairs = random_layer(SPEC), random_pairs(SPEC, 5)
        with self.open() as device:
            kernel = self.accurate_kernel(device, SPEC, weight_format)
            for index, weights in random_layer(SPEC, seed=9).items():
                kernel.load(index, weights)
            for index in (1, 3, 0, 2):
                kernel.load(index, experts[index])
            self.check_kernel(kernel, weight_format, experts, pairs)

    def test_resident_and_unload(self) -> None:
        """``resident`` follows ``load`` and what unloads; unloading twice does nothing."""
        weight_format, experts = self.computed_formats()[0], random_layer(SPEC)
        with self.open() as device:
            kernel = self.accurate_kernel(device, SPEC, weight_format)
            assert kernel.resident() == frozenset()
            for index in (3, 1, 0):
                kernel.load(index, experts[index])
            assert kernel.resident() == {0, 1, 3}
            kernel.unload(1)
            kernel.unload(1)
            kernel.unload(2)
            assert kernel.resident() == {0, 3}
            kernel.load(1, experts[1])
            assert kernel.resident() == {0, 1, 3}
            ids = torch.tensor([[1, 0], [3, 1]])
            pairs = replace(random_pairs(SPEC, 2), expert_ids=ids)
            self.check_kernel(kernel, weight_format, experts, pairs)
            for _ in range(2):
                kernel.unload_all()
                assert kernel.resident() == frozenset()
            for index in (3, 1, 0):
                kernel.load(index, experts[index])
            self.check_kernel(kernel, weight_format, experts, pairs)

    def test_bytes(self, weight_format: WeightFormat) -> None:
        """Kernel and device agree, and no fewer bytes are claimed than the numbers take."""
        plain = [SPEC, replace(SPEC, has_bias=True)]
        ungated = Activation(kind=ActivationKind.RELU2, is_gated=False)
        for spec in (*plain, replace(SPEC, activation=ungated)):
            with self.open() as device:
                claimed = device.expert_bytes(spec, weight_format.descriptor)
                kernel = device.expert_kernel(spec, weight_format.descriptor)
                assert kernel.bytes_per_expert == claimed
                kernel.load(0, random_layer(spec)[0])
                assert kernel.bytes_per_expert == claimed
            widest = max(spec.hidden_size, spec.intermediate_size)
            bits = weight_format.descriptor.bits_per_weight(widest)
            assert claimed >= spec.weights_per_expert * bits / 8

    def test_load_refuses_what_does_not_fit(self, weight_format: WeightFormat) -> None:
        """Shapes, types, formats and parts; afterwards the expert is not resident."""
        good = random_layer(replace(SPEC, has_bias=True))[0]
        plain = replace(good, gate_bias=None, up_bias=None, down_bias=None)
        ungated = Activation(kind=ActivationKind.RELU2, is_gated=False)
        with self.open() as device:
            kernel = device.expert_kernel(SPEC, weight_format.descriptor)
            biased = device.expert_kernel(replace(SPEC, has_bias=True), weight_format.descriptor)
            alone = device.expert_kernel(
                replace(SPEC, activation=ungated), weight_format.descriptor
            )
            for expert in (-1, SPEC.num_experts):
                with refuses(f"expert {expert}"):
                    kernel.load(expert, plain)
            _refuses_load(kernel, "a missing gate", replace(plain, gate=None))
            _refuses_load(kernel, "a bias where there is none", good)
            _refuses_load(biased, "missing biases", plain)
            _refuses_load(alone, "a gate where there is none", plain)
            for name in ("gate", "up", "down"):
                part = getattr(plain, name)
                for what, bad in {
                    f"{name} transposed": part.T,
                    f"{name} one column short": part[:, 1:],
                    f"{name} of one dimension": part.flatten(),
                    f"{name} of integers": part.to(torch.int32),
                }.items():
                    _refuses_load(kernel, what, replace(plain, **{name: bad}))
                bias = getattr(good, f"{name}_bias")
                short = replace(good, **{f"{name}_bias": bias[1:]})
                _refuses_load(biased, f"{name}_bias one short", short)

    def test_load_refuses_numbers_that_are_not_finite(self, weight_format: WeightFormat) -> None:
        """One NaN or infinity anywhere: in a dense weight, a bias, a scale or a stored weight."""
        spec = replace(SPEC, has_bias=True)
        good = random_layer(spec)[0]
        with self.open() as device:
            kernel = device.expert_kernel(spec, weight_format.descriptor)
            for field in fields(good):
                for value in (float("nan"), float("inf"), -float("inf")):
                    what = f"{value} in {field.name}"
                    bad = _poisoned(getattr(good, field.name), value)
                    _refuses_load(kernel, what, replace(good, **{field.name: bad}))
            for name in ("gate", "up", "down"):
                stored = weight_format.quantize(getattr(good, name))
                for value in (float("nan"), float("inf")):
                    for part, poisoned in _poisoned_quantized(stored, value).items():
                        parts: dict[str, Any] = {name: poisoned}
                        what = f"{value} in {part} of quantised {name}"
                        _refuses_load(kernel, what, replace(good, **parts))

    def test_load_refuses_other_formats(self, weight_format: WeightFormat) -> None:
        """A quantised tensor must be of the kernel's format and of the right shapes."""
        plain = random_layer(SPEC)[0]
        assert isinstance(plain.up, torch.Tensor)
        with self.open() as device:
            kernel = device.expert_kernel(SPEC, weight_format.descriptor)
            for other in self.formats:
                if other.descriptor != weight_format.descriptor:
                    bad = replace(plain, up=other.quantize(plain.up))
                    _refuses_load(kernel, other.descriptor.name, bad)
            stored = weight_format.quantize(plain.up)
            short = replace(stored, codes=stored.codes[1:])
            _refuses_load(kernel, "codes one row short", replace(plain, up=short))
            if stored.scales is not None:
                short = replace(stored, scales=stored.scales[1:])
                _refuses_load(kernel, "scales one row short", replace(plain, up=short))
                none = replace(stored, scales=None)
                _refuses_load(kernel, "no scales", replace(plain, up=none))
            for part in ("zero_points", "minimums", "output_scales"):
                if getattr(stored, part) is not None:
                    nothing: dict[str, Any] = {part: None}
                    without = replace(stored, **nothing)
                    _refuses_load(kernel, f"no {part}", replace(plain, up=without))

    def test_loads_from_several_threads(self, weight_format: WeightFormat) -> None:
        """Loading all experts at once gives what loading them one by one gives."""
        spec = replace(SPEC, num_experts=8)
        experts = random_layer(spec)
        together = threading.Barrier(4)

        def load(first: int) -> None:
            together.wait()
            for index in (first, first + 4):
                kernel.load(index, experts[index])

        with self.open() as device, ThreadPoolExecutor(4) as pool:
            kernel = self.accurate_kernel(device, spec, weight_format)
            for done in [pool.submit(load, first) for first in range(4)]:
                done.result()
            assert kernel.resident() == frozenset(range(8))
            self.check_kernel(kernel, weight_format, experts, random_pairs(spec, 16))

    def test_load_neither_keeps_nor_changes_the_tensors(self, weight_format: WeightFormat) -> None:
        """The loader reuses its buffers as soon as ``load`` returns."""
        spec = replace(SPEC, has_bias=True)
        pairs = random_pairs(spec, 5)
        forms: list[Callable[[torch.Tensor], Any]] = [torch.Tensor.float, torch.Tensor.bfloat16]
        forms.append(weight_format.quantize)
        with self.open() as device:
            for form in forms:
                kernel = self.accurate_kernel(device, spec, weight_format)
                experts = _in_form(random_layer(spec), form)
                for index, weights in _in_form(random_layer(spec), form).items():
                    kernel.load(index, weights)
                    for part, tensor in _tensors(weights).items():
                        same = torch.equal(tensor, _tensors(experts[index])[part])
                        assert same, f"{part} changed"
                        tensor.fill_(7)
                self.check_kernel(kernel, weight_format, experts, pairs)


class SubmittingRules(BackendHarness):
    """Part of ``BackendContract``: what ``submit`` and tickets promise."""

    def test_submit_refuses_what_does_not_fit(self) -> None:
        """Shapes and types; where the host reads ids, those out of range and not resident too."""
        pairs = random_pairs(SPEC, 2)
        hidden, ids, weights = pairs.hidden, torch.tensor([[0, 1], [1, 0]]), pairs.weights
        cases = {
            "hidden states of one dimension": (hidden[0], ids[0], weights[0]),
            "hidden states one short": (hidden[:, 1:], ids, weights),
            "float64 hidden states": (hidden.double(), ids, weights),
            "integer hidden states": (hidden.to(torch.int32), ids, weights),
            "ids of one dimension": (hidden, ids[:, 0], weights[:, 0]),
            "ids of another number of tokens": (hidden, ids[:1], weights[:1]),
            "no id at all": (hidden, ids[:, :0], weights[:, :0]),
            "ids that are no integers": (hidden, ids.float(), weights),
            "weights of another shape": (hidden, ids, weights[:, :1]),
            "weights that are integers": (hidden, ids, weights.to(torch.int64)),
        }
        with self.open() as device:
            kernel = device.expert_kernel(SPEC, self.computed_formats()[0].descriptor)
            for index in (0, 1):
                kernel.load(index, random_layer(SPEC)[index])
            for what, arguments in cases.items():
                with refuses(what):
                    self.submit(kernel, Pairs(*arguments)).wait()

    def test_ids_that_the_kernel_does_not_hold(self) -> None:
        """On the host they are refused; elsewhere nobody reads them there, and they add nothing."""
        pairs = replace(random_pairs(SPEC, 2), expert_ids=torch.tensor([[0, 1], [1, 0]]))
        cases = {"id -2": -2, "id num_experts": SPEC.num_experts, "no resident expert": 2}
        with self.open() as device:
            kernel = device.expert_kernel(SPEC, self.computed_formats()[0].descriptor)
            for index in (0, 1):
                kernel.load(index, random_layer(SPEC)[index])
            ids = pairs.expert_ids
            for what, bad in cases.items():
                self._check_unheld(kernel, what, replace(pairs, expert_ids=ids.where(ids > 0, bad)))
            kernel.unload(0)
            self._check_unheld(kernel, "an expert that was unloaded", pairs)

    def _check_unheld(self, kernel: ExpertKernel, what: str, pairs: Pairs) -> None:
        """All ids but 1 are of nobody here."""
        if torch.device(self.info().torch_device).type == "cpu":
            with refuses(what):
                self.submit(kernel, pairs).wait()
            return
        ids = pairs.expert_ids
        others = replace(pairs, expert_ids=ids.where(ids == 1, -1))
        same = torch.equal(self.compute(kernel, pairs), self.compute(kernel, others))
        assert same, f"{what} must add nothing"

    def test_submit_does_not_change_its_arguments(self) -> None:
        """Neither the hidden states nor the routing."""
        where = self.info().torch_device
        with self.open() as device:
            kernel = self._loaded(device.expert_kernel)
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                pairs = random_pairs(SPEC, 5, dtype=dtype)
                given = [getattr(pairs, f.name).to(where, copy=True) for f in fields(pairs)]
                kernel.submit(given[0], given[1], given[2]).wait()
                for field, tensor in zip(fields(pairs), given, strict=True):
                    same = torch.equal(tensor.cpu(), getattr(pairs, field.name))
                    assert same, f"{field.name} changed"

    def test_several_tickets_at_once(self) -> None:
        """Of two layers, waited for in another order than submitted; results stay what they are."""
        weight_format, experts = self.computed_formats()[0], random_layer(SPEC)
        with self.open() as device:
            kernels = [self.accurate_kernel(device, SPEC, weight_format) for _ in range(2)]
            for kernel in kernels:
                for index, weights in experts.items():
                    kernel.load(index, weights)
            work = [random_pairs(SPEC, tokens, seed=tokens) for tokens in (17, 1, 0, 9, 2, 30)]
            tickets = [self.submit(kernels[i % 2], pairs) for i, pairs in enumerate(work)]
            results = {i: tickets[i].wait() for i in (5, 0, 3, 1, 4, 2)}
            for i, pairs in enumerate(work):
                got = results[i].cpu()
                self.check_kernel(kernels[i % 2], weight_format, experts, pairs, got)

    def test_a_ticket_keeps_what_it_reads_alive(self) -> None:
        """The caller may let go of the tensors and of the kernel before it waits."""
        weight_format, experts = self.computed_formats()[0], random_layer(SPEC)
        pairs = random_pairs(SPEC, 64)
        with self.open() as device:
            kernel = self.accurate_kernel(device, SPEC, weight_format)
            for index, weights in experts.items():
                kernel.load(index, weights)
            other = self.accurate_kernel(device, SPEC, weight_format)
            ticket = self.submit(kernel, pairs)
            del kernel
            gc.collect()
            where = self.info().torch_device
            rubbish = [torch.full_like(pairs.hidden, 7.0, device=where) for _ in range(8)]
            got = ticket.wait().cpu()
            del rubbish
            self.check_kernel(other, weight_format, experts, pairs, got)

    def test_tickets_may_be_dropped(self) -> None:
        """Nobody waits: nothing leaks into the next call, nothing crashes, even at ``close``."""
        weight_format, experts = self.computed_formats()[0], random_layer(SPEC)
        pairs = random_pairs(SPEC, 40)
        with self.open() as device:
            kernel = self.accurate_kernel(device, SPEC, weight_format)
            for index, weights in experts.items():
                kernel.load(index, weights)
            for seed in range(5):
                self.submit(kernel, random_pairs(SPEC, 40, seed=seed))
            gc.collect()
            self.check_kernel(kernel, weight_format, experts, pairs)
            dropped = self.submit(kernel, pairs)
            del dropped
        del kernel
        gc.collect()

    def _loaded(self, make: Callable[..., ExpertKernel], spec: MoeSpec = SPEC) -> ExpertKernel:
        kernel = make(spec, self.computed_formats()[0].descriptor)
        for index, weights in random_layer(spec).items():
            kernel.load(index, weights)
        return kernel


def _refuses_load(kernel: ExpertKernel, what: str, weights: ExpertWeights) -> None:
    with refuses(what):
        kernel.load(0, weights)
    assert kernel.resident() == frozenset(), f"after {what} the expert must not be resident"


def _in_form(
    experts: dict[int, ExpertWeights], form: Callable[[torch.Tensor], Any]
) -> dict[int, ExpertWeights]:
    """Convert the matrices: to a type, or to quantised tensors."""
    names = ("gate", "up", "down")
    return {
        index: replace(weights, **{name: form(getattr(weights, name)) for name in names})
        for index, weights in experts.items()
    }


def _tensors(weights: ExpertWeights) -> dict[str, torch.Tensor]:
    """Every tensor there is, quantised parts taken apart."""
    parts = {field.name: getattr(weights, field.name) for field in fields(weights)}
    for name, part in list(parts.items()):
        if isinstance(part, QuantizedTensor):
            pieces = {f"{name}.{field.name}": getattr(part, field.name) for field in fields(part)}
            parts |= pieces
    return {name: part for name, part in parts.items() if isinstance(part, torch.Tensor)}


def _poisoned(tensor: torch.Tensor, value: float) -> torch.Tensor:
    """Return a copy whose last element is ``value``: where vector loops have their tails."""
    bad = tensor.clone()
    bad.view(-1)[-1] = value
    return bad


def _poisoned_quantized(stored: QuantizedTensor, value: float) -> dict[str, QuantizedTensor]:
    """Each part that holds floating-point numbers, poisoned alone."""
    names = ["codes"] if stored.scales is None else ["scales", "minimums"]
    found = {}
    for name in names:
        part = getattr(stored, name)
        if part is not None:
            changed: dict[str, Any] = {name: _poisoned(part, value)}
            found[name] = replace(stored, **changed)
    return found
