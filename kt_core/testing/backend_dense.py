"""The dense layers of ``BackendContract``, against the float64 reference."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

from kt_core.errors import UnsupportedDenseError, UnsupportedTrainingError
from kt_core.interfaces import ExpertDevice, LinearKernel, WeightFormat
from kt_core.packed.codec import pack_linear
from kt_core.testing import reference_linear as linear_reference
from kt_core.testing.backend_harness import (
    SPEC,
    BackendHarness,
    is_within,
    precisions,
    worst_of,
)
from kt_core.testing.backward_reference import Bounded
from kt_core.testing.common import refuses
from kt_core.types import ActivationPrecision, LinearSpec

# Neither size is a multiple of a group, or of a vector register.
DENSE = LinearSpec(in_features=160, out_features=72, has_bias=True)


def random_dense(spec: LinearSpec, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Make weights and bias of a layer."""
    return linear_reference.random_linear(spec, torch.Generator().manual_seed(seed))


def random_rows(
    rows: int, features: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> torch.Tensor:
    """Make activations."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, features, generator=generator).to(dtype)


class BackendDense(BackendHarness):
    """Part of ``BackendContract``; skips where the device computes no dense layers."""

    def test_says_whether_it_computes_dense(self, weight_format: WeightFormat) -> None:
        """A device that does not says so when it is asked."""
        with self.open() as device:
            if device.capabilities.computes_dense:
                kernel = device.linear_kernel(DENSE, weight_format.descriptor)
                assert kernel.spec == DENSE
                assert kernel.weight_format == weight_format.descriptor
                assert kernel.trains == device.capabilities.trains
                return
            with pytest.raises(UnsupportedDenseError, match=device.info.name):
                device.linear_kernel(DENSE, weight_format.descriptor)
            with pytest.raises(UnsupportedDenseError, match=device.info.name):
                device.linear_bytes(DENSE, weight_format.descriptor)

    def test_dense_matches_the_reference(self, weight_format: WeightFormat, tokens: int) -> None:
        """Every format and precision, from no row to more than a vector register holds."""
        with self._dense() as device:
            self.check_dense(device, DENSE, weight_format, random_rows(tokens, 160))

    def test_types_of_dense_activations(self, weight_format: WeightFormat) -> None:
        """The result has the type of the activations."""
        with self._dense() as device:
            for dtype in (torch.bfloat16, torch.float16, torch.float32):
                self.check_dense(device, DENSE, weight_format, random_rows(5, 160, dtype))

    def test_odd_dense_shapes(self, weight_format: WeightFormat) -> None:
        """Sizes of one, and on both sides of a vector register; with a bias and without."""
        with self._dense() as device:
            for inputs, outputs in ((1, 1), (15, 17), (33, 31), (64, 129)):
                for has_bias in (False, True):
                    spec = LinearSpec(in_features=inputs, out_features=outputs, has_bias=has_bias)
                    self.check_dense(device, spec, weight_format, random_rows(3, inputs))

    def test_dense_rows_of_any_shape(self) -> None:
        """Any strides, any leading dimensions, none at all; the arguments stay as they are.

        The same number of rows gives the same bits; another number may take another kernel.
        """
        rows = random_rows(6, 160)
        with self._dense() as device:
            kernel = self._accurate_dense(device, self.computed_formats()[0])
            want = self.apply(kernel, rows)
            cases = {
                "strided": (rows.T.contiguous().T, want),
                "with gaps": (torch.stack([rows, rows], 1)[:, 1], want),
                "of three dimensions": (rows.view(2, 3, 160), want.view(2, 3, 72)),
                "transposed": (
                    rows.view(3, 2, 160).transpose(0, 1),
                    want.view(3, 2, 72).transpose(0, 1),
                ),
                "a vector": (rows[2], self.apply(kernel, rows[2:3])[0]),
                "no row": (rows.view(2, 3, 160)[:, :0], want.view(2, 3, 72)[:, :0]),
            }
            for what, (given, expected) in cases.items():
                before = given.clone()
                got = self.apply(kernel, given)
                assert got.shape == expected.shape, what
                assert torch.equal(got, expected), f"{what}: another result"
                assert torch.equal(given, before), f"{what}: changed"

    def test_dense_gradients_match_the_reference(
        self, weight_format: WeightFormat, tokens: int
    ) -> None:
        """The gradient of the input, of every type, and what it is a gradient of."""
        with self._dense() as device:
            if not device.capabilities.trains:
                kernel = self._loaded_dense(device, weight_format)
                with pytest.raises(UnsupportedTrainingError, match=weight_format.descriptor.name):
                    kernel.grad_input(random_rows(1, 72))
                pytest.skip(f"device {device.info.name!r} does not train")
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                self.check_dense_gradient(device, weight_format, tokens, dtype)

    def test_dense_bytes(self, weight_format: WeightFormat) -> None:
        """Kernel and device agree, and no fewer bytes are claimed than the numbers take."""
        with self._dense() as device:
            for spec in (DENSE, replace(DENSE, has_bias=False)):
                claimed = device.linear_bytes(spec, weight_format.descriptor)
                assert device.linear_kernel(spec, weight_format.descriptor).size_bytes == claimed
                bits = weight_format.descriptor.bits_per_weight(spec.in_features)
                bias_bytes = 4 * spec.out_features if spec.has_bias else 0
                numbers = spec.in_features * spec.out_features
                assert claimed >= numbers * bits / 8 + bias_bytes

    def test_dense_load_replaces(self, weight_format: WeightFormat) -> None:
        """A layer loaded again is the new one; a refused one is gone."""
        with self._dense() as device:
            kernel = self._dense_kernel(device, weight_format)
            assert not kernel.is_loaded
            kernel.load(*random_dense(DENSE, seed=9))
            assert kernel.is_loaded
            kernel.load(*random_dense(DENSE))
            self.check_dense_kernel(kernel, weight_format)
            weight, bias = random_dense(DENSE)
            weight[-1, -1] = float("nan")
            with refuses("a NaN"):
                kernel.load(weight, bias)
            assert not kernel.is_loaded, "after an error nothing is loaded"
            with refuses("computing without weights"):
                self.apply(kernel, random_rows(1, 160))

    def test_packed_dense_bytes(self, weight_format: WeightFormat) -> None:
        """Those of every device: taken from one kernel, they make another the same."""
        weight, bias = random_dense(DENSE)
        rows = random_rows(3, 160)
        with self._dense() as device:
            kernel, other = (self._dense_kernel(device, weight_format) for _ in range(2))
            if not kernel.moves_packed:
                with refuses("handing out packed bytes"):
                    kernel.packed()
                pytest.skip(f"device {device.info.name!r} does not move packed layers")
            with refuses("handing out what is not loaded"):
                kernel.packed()
            kernel.load(weight, bias)
            packed = kernel.packed().cpu()
            want = pack_linear(
                weight_format.quantize(weight), bias, DENSE, weight_format.descriptor
            )
            assert torch.equal(packed, want)
            other.load_packed(want.clone())
            assert torch.equal(self.apply(other, rows), self.apply(kernel, rows))
            other.map_packed(want)
            assert torch.equal(self.apply(other, rows), self.apply(kernel, rows))
            for what, bad in {
                "bytes one short": want[1:],
                "bytes of another type": want.view(torch.int8),
                "bytes with gaps": torch.stack([want, want], 1)[:, 0],
            }.items():
                with refuses(what):
                    other.load_packed(bad)

    def test_dense_weights_in_any_form(self, weight_format: WeightFormat) -> None:
        """Views, other types, quantised before or by ``load``: the same bits. Nothing is kept."""
        plain, bias = random_dense(DENSE)
        plain = plain.bfloat16().float()
        plain = plain.where(plain.abs() > 2e-4, 0)  # exact in float16 too
        assert bias is not None
        forms: dict[str, Any] = {
            "float32": plain,
            "bfloat16": plain.bfloat16(),
            "float16": plain.half(),
            "transposed": plain.T.contiguous().T,
            "every other row": torch.stack([plain, plain], 1).flatten(0, 1)[0::2],
            "quantised": weight_format.quantize(plain),
        }
        rows = random_rows(3, 160)
        with self._dense() as device:
            kernel = self._dense_kernel(device, weight_format)
            kernel.load(plain.clone(), bias)
            want = self.apply(kernel, rows)
            for what, form in forms.items():
                kept_bias = bias.clone()
                kernel.load(form, kept_bias)
                kept_bias.fill_(7)
                if isinstance(form, torch.Tensor):
                    form.fill_(7)
                assert torch.equal(self.apply(kernel, rows), want), what

    def test_dense_refuses_what_does_not_fit(self, weight_format: WeightFormat) -> None:
        """Shapes, types, formats, numbers; a bias where there is none and the other way round."""
        weight, bias = random_dense(DENSE)
        assert bias is not None
        nan_bias = bias.clone()
        nan_bias[-1] = float("inf")
        other = next(f for f in self.formats if f.descriptor != weight_format.descriptor)
        with self._dense() as device:
            kernel = self._dense_kernel(device, weight_format)
            plain = device.linear_kernel(replace(DENSE, has_bias=False), weight_format.descriptor)
            for what, bad, bad_bias in (
                ("a transposed weight", weight.T, bias),
                ("a weight one column short", weight[:, 1:], bias),
                ("a weight of one dimension", weight.flatten(), bias),
                ("a weight of integers", weight.to(torch.int32), bias),
                ("a weight of another format", other.quantize(weight), bias),
                ("a missing bias", weight, None),
                ("a bias one short", weight, bias[1:]),
                ("an infinite bias", weight, nan_bias),
            ):
                with refuses(what):
                    kernel.load(bad, bad_bias)
                assert not kernel.is_loaded, f"after {what} nothing is loaded"
            with refuses("a bias where there is none"):
                plain.load(weight, bias)
            kernel.load(weight, bias)
            rows = random_rows(2, 160)
            for what, x in {
                "rows one short": rows[:, 1:],
                "float64 rows": rows.double(),
                "rows of integers": rows.to(torch.int32),
                "a single number": rows[0, 0],
            }.items():
                with refuses(what):
                    self.apply(kernel, x)

    def test_dense_layers_load_at_once(self, weight_format: WeightFormat) -> None:
        """Several threads, each with a layer of its own."""
        together = threading.Barrier(4)

        def load(kernel: LinearKernel) -> None:
            weight, bias = random_dense(DENSE)
            together.wait()
            kernel.load(weight, bias)

        with self._dense() as device, ThreadPoolExecutor(4) as pool:
            kernels = [self._accurate_dense(device, weight_format, load=False) for _ in range(4)]
            for done in [pool.submit(load, kernel) for kernel in kernels]:
                done.result()
            for kernel in kernels:
                self.check_dense_kernel(kernel, weight_format)

    @contextmanager
    def _dense(self) -> Iterator[ExpertDevice]:
        with self.open() as device:
            if not device.capabilities.computes_dense:
                pytest.skip(f"device {device.info.name!r} computes no dense layers")
            yield device

    def _dense_kernel(self, device: ExpertDevice, weight_format: WeightFormat) -> LinearKernel:
        return device.linear_kernel(DENSE, weight_format.descriptor)

    def _loaded_dense(self, device: ExpertDevice, weight_format: WeightFormat) -> LinearKernel:
        kernel = self._dense_kernel(device, weight_format)
        kernel.load(*random_dense(DENSE))
        return kernel

    def _accurate_dense(
        self, device: ExpertDevice, weight_format: WeightFormat, *, load: bool = True
    ) -> LinearKernel:
        exact = ActivationPrecision.FLOAT32
        kernel = device.linear_kernel(DENSE, weight_format.descriptor, precision=exact)
        if load:
            kernel.load(*random_dense(DENSE))
        return kernel

    def apply(self, kernel: LinearKernel, x: torch.Tensor) -> torch.Tensor:
        """Compute where the device is."""
        return kernel.apply(x.to(self._torch_device)).cpu()

    def check_dense_kernel(self, kernel: LinearKernel, weight_format: WeightFormat) -> None:
        """Compare a kernel that holds ``random_dense(DENSE)`` with the dequantised weights.

        In whatever precision it computes: it must be near one of them.
        """
        rows = random_rows(5, 160)
        layer = linear_reference.dense(weight_format, *random_dense(DENSE))
        got = self.apply(kernel, rows)
        named = [p for p in ActivationPrecision if p is not ActivationPrecision.AUTO]
        wanted = [linear_reference.forward(layer, rows, precision) for precision in named]
        assert any(is_within(got, want.value, want.error) for want in wanted)

    def check_dense(
        self,
        device: ExpertDevice,
        spec: LinearSpec,
        weight_format: WeightFormat,
        rows: torch.Tensor,
    ) -> None:
        """Compare all precisions of a format; ``AUTO`` must be one that has a name."""
        weight, bias = random_dense(spec)
        layer = linear_reference.dense(weight_format, weight, bias)
        outputs = {}
        for precision in precisions(device, SPEC, weight_format):
            kernel = device.linear_kernel(spec, weight_format.descriptor, precision=precision)
            kernel.load(weight, bias)
            outputs[precision] = self.apply(kernel, rows)
            assert outputs[precision].dtype is rows.dtype
            assert outputs[precision].shape == (len(rows), spec.out_features)
        automatic = outputs.pop(ActivationPrecision.AUTO)
        problems = {}
        for precision, got in outputs.items():
            want = linear_reference.forward(layer, rows, precision)
            _check(got, want, precision)
            if not is_within(automatic, want.value, want.error):
                problems[precision] = worst_of(automatic, want.value, want.error)
        assert len(problems) < len(outputs), f"auto is none of the named precisions: {problems}"

    def check_dense_gradient(
        self, device: ExpertDevice, weight_format: WeightFormat, rows: int, dtype: torch.dtype
    ) -> None:
        """Compare the gradient, and the forward pass that it belongs to."""
        weight, bias = random_dense(DENSE)
        layer = linear_reference.dense(weight_format, weight, bias)
        x, grad = random_rows(rows, 160, dtype), random_rows(rows, 72, dtype, seed=1)
        for precision in precisions(device, SPEC, weight_format):
            if precision is ActivationPrecision.AUTO:
                continue
            kernel = device.linear_kernel(DENSE, weight_format.descriptor, precision=precision)
            kernel.load(weight, bias)
            out = kernel.apply_training(x.to(self._torch_device)).cpu()
            _check(out, linear_reference.forward(layer, x, precision), precision)
            got = kernel.grad_input(grad.to(self._torch_device)).cpu()
            assert got.dtype is dtype
            _check(got, linear_reference.grad_input(layer, grad, precision), precision)


def _check(got: torch.Tensor, want: Bounded, what: object) -> None:
    assert got.shape == want.value.shape
    within = (got, want.value, want.error)
    assert is_within(*within), f"{what}: {worst_of(*within)}"
