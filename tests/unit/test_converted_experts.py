"""Kernels over vendors' operators, with stand-ins that have the recorded signatures.

All numbers are small integers, which bfloat16 holds exactly: the results must be equal, so that a
swapped argument, nibble or group shows. What the real operators round is not tested here.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from types import ModuleType

import pytest
import torch

from kt_core.accelerator.converted_kernel import ConvertedExpertKernel
from kt_core.interfaces import ExpertWeights, QuantizedTensor
from kt_core.quant import BUILT_IN_FORMATS
from kt_core.testing import reference
from kt_core.types import Activation, ActivationKind, Format, MoeSpec
from kt_npu.kernel import NpuExpertKernel
from kt_xpu.torch_experts import TorchExpertKernel

FORMATS = {f.descriptor.name: f for f in BUILT_IN_FORMATS}
RELU = Activation(kind=ActivationKind.RELU)
SPEC = MoeSpec(num_experts=5, hidden_size=128, intermediate_size=64, activation=RELU, has_bias=True)
RESIDENT = (0, 1, 4)
HOST = torch.device("cpu")


def int4_product(
    x: torch.Tensor, codes: torch.Tensor, group: int, scales: torch.Tensor, zeros: torch.Tensor
) -> torch.Tensor:
    """``aten::_weight_int4pack_mm_with_scales_and_zeros`` for the CPU, which torch lacks."""
    assert x.dtype is torch.bfloat16
    assert (codes.dtype, scales.dtype, zeros.dtype) == (torch.int32, torch.bfloat16, torch.int8)
    nibbles = torch.stack([codes >> (4 * place) & 15 for place in range(8)], dim=-1).flatten(1)
    assert scales.shape == zeros.shape == (x.shape[1] // group, len(codes))
    spread = [part.float().repeat_interleave(group, dim=0) for part in (scales, zeros)]
    weights = (nibbles.T.float() - spread[1]) * spread[0]
    return (x.float() @ weights).bfloat16()


def npu_convert_weight_to_int4pack(weight: torch.Tensor, inner_k_tiles: int = 0) -> torch.Tensor:
    """Return ``[k, n]`` int32 codes as ``[k, n / 8]``, the first one lowest."""
    assert weight.dtype is torch.int32
    assert inner_k_tiles == 0
    assert bool((weight.abs() <= 8).all())
    eight = (weight & 15).unflatten(1, (-1, 8))
    return sum((eight[..., i] << (4 * i) for i in range(8)), torch.zeros_like(eight[..., 0]))


def npu_grouped_matmul(
    x: Sequence[torch.Tensor],
    weight: Sequence[torch.Tensor],
    *,
    bias: Sequence[torch.Tensor] | None = None,
    scale: Sequence[torch.Tensor] | None = None,
    offset: Sequence[torch.Tensor] | None = None,
    antiquant_scale: Sequence[torch.Tensor] | None = None,
    antiquant_offset: Sequence[torch.Tensor] | None = None,
    per_token_scale: Sequence[torch.Tensor] | None = None,
    group_list: torch.Tensor | None = None,
    activation_input: Sequence[torch.Tensor] | None = None,
    activation_quant_scale: Sequence[torch.Tensor] | None = None,
    activation_quant_offset: Sequence[torch.Tensor] | None = None,
    split_item: int = 0,
    group_type: int | None = None,
    group_list_type: int = 0,
    act_type: int = 0,
    output_dtype: torch.dtype | None = None,
) -> list[torch.Tensor]:
    """One x, several weights, one result; groups along the rows, given by their ends."""
    unused = (
        bias, scale, offset, per_token_scale, activation_input, activation_quant_scale,
        activation_quant_offset, output_dtype,
    )  # fmt: skip
    assert not any(argument is not None for argument in unused)
    assert (split_item, group_type, group_list_type, act_type) == (3, 0, 0, 0)
    assert group_list is not None
    assert group_list.dtype is torch.int64
    (rows,) = x
    result = torch.full((len(rows), _outputs(weight[0])), float("nan"), dtype=torch.bfloat16)
    first = 0
    for index, end in enumerate(group_list.tolist()):
        matrix = weight[index].float()
        if antiquant_scale is not None and antiquant_offset is not None:
            nibbles = [weight[index] << (28 - 4 * i) >> 28 for i in range(8)]
            codes = torch.stack(nibbles, dim=-1).flatten(1).float()
            size = len(codes) // len(antiquant_scale[index])
            parts = (antiquant_offset[index], antiquant_scale[index])
            added, factor = (part.float().repeat_interleave(size, dim=0) for part in parts)
            matrix = (codes + added) * factor
        result[first:end] = (rows[first:end].float() @ matrix).bfloat16()
        first = end
    return [result]


def _outputs(weight: torch.Tensor) -> int:
    return weight.shape[1] * (8 if weight.dtype is torch.int32 else 1)


@pytest.fixture(autouse=True)
def operators(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Bring the stand-ins to where the kernels look for the operators."""
    torch_npu = ModuleType("torch_npu")
    for operator in (npu_grouped_matmul, npu_convert_weight_to_int4pack):
        setattr(torch_npu, operator.__name__, operator)
    monkeypatch.setitem(sys.modules, "torch_npu", torch_npu)
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("_weight_int4pack_mm_with_scales_and_zeros", int4_product, "CPU")
        yield


def ternary(rows: int, cols: int, weight_format: Format, seed: int) -> QuantizedTensor:
    """A matrix of a few ones and minus ones, in groups that have different scales and zeros."""
    generator = torch.Generator().manual_seed(seed)
    wanted = torch.randint(-1, 2, (rows, cols), generator=generator)
    wanted *= (torch.rand(rows, cols, generator=generator) < 0.06).int()
    if weight_format.scale is None:
        return QuantizedTensor(weight_format=weight_format, codes=wanted.bfloat16())
    groups = weight_format.num_groups(cols)
    scales = 2.0 ** -torch.randint(0, 3, (rows, groups), generator=generator)
    zeros = torch.randint(4, 12, (rows, groups), generator=generator)
    spread = [part.repeat_interleave(cols // groups, dim=1) for part in (scales, zeros)]
    codes = wanted / spread[0]
    if weight_format.has_zero_point:
        codes = (codes + spread[1]).to(torch.uint8)
        return QuantizedTensor(
            weight_format=weight_format, codes=codes, scales=scales,
            zero_points=zeros.to(torch.uint8),
        )  # fmt: skip
    return QuantizedTensor(weight_format=weight_format, codes=codes.to(torch.int8), scales=scales)


def expert(spec: MoeSpec, weight_format: Format, seed: int) -> ExpertWeights:
    """One of small integers, biases too."""
    inner, hidden = spec.intermediate_size, spec.hidden_size
    gated, biased = spec.activation.is_gated, spec.has_bias

    def bias(size: int) -> torch.Tensor | None:
        return torch.arange(size).remainder(3).float() - 1 if biased else None

    return ExpertWeights(
        gate=ternary(inner, hidden, weight_format, seed) if gated else None,
        up=ternary(inner, hidden, weight_format, seed + 1),
        down=ternary(hidden, inner, weight_format, seed + 2),
        gate_bias=bias(inner) if gated else None,
        up_bias=bias(inner),
        down_bias=bias(hidden),
    )


@pytest.mark.parametrize("kernel_class", [TorchExpertKernel, NpuExpertKernel])
@pytest.mark.parametrize("name", ["bf16", "int4-g32", "int4-g64", "int4-g64-asym", "int4-g32-asym"])
@pytest.mark.parametrize("is_plain", [False, True], ids=["gated-bias", "ungated"])
def test_exact(kernel_class: type[ConvertedExpertKernel], name: str, is_plain: bool) -> None:
    """Experts that are not there, ids that are nobody's, repeated ids, an expert that leaves."""
    spec = replace(SPEC, activation=replace(RELU, is_gated=False), has_bias=False)
    spec = spec if is_plain else SPEC
    weight_format = FORMATS[name]
    kernel = kernel_class(HOST, spec, weight_format.descriptor)
    experts = {e: expert(spec, weight_format.descriptor, 10 * e) for e in (*RESIDENT, 2)}
    for index in (2, 4, 0, 1):
        kernel.load(index, experts[index])
    kernel.unload(2)
    assert kernel.resident() == frozenset(RESIDENT)
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randint(-1, 2, (6, spec.hidden_size), generator=generator).bfloat16()
    ids = torch.tensor([[0, 4, 1], [1, 1, -1], [2, 3, 5], [4, 0, 2], [-1, -1, -7], [0, 0, 0]])
    weights = torch.tensor([[1.0, 2.0, 0.5]]).expand(6, 3).clone()
    weights[2] = float("inf")  # nobody's: whatever it is
    got = kernel.submit(hidden.float(), ids, weights).wait()
    known = ids.where((ids >= 0) & (ids != 2) & (ids != 3) & (ids < 5), -1)
    layer = reference.layer(spec, weight_format, {e: experts[e] for e in RESIDENT})
    want = reference.exact(layer, hidden.float(), known, weights)
    assert float(want.abs().max()) > 3, "a test of zeros"
    assert torch.equal(got.double(), want)


@pytest.mark.parametrize("kernel_class", [TorchExpertKernel, NpuExpertKernel])
def test_nobody_there(kernel_class: type[ConvertedExpertKernel]) -> None:
    """No expert, no token; packed bytes cannot be had, and no gradient."""
    kernel = kernel_class(HOST, SPEC, FORMATS["bf16"].descriptor)
    hidden, ids = torch.ones(2, SPEC.hidden_size), torch.zeros(2, 1, dtype=torch.int64)
    assert torch.equal(
        kernel.submit(hidden, ids, torch.ones(2, 1)).wait(), torch.zeros_like(hidden)
    )
    kernel.load(0, expert(SPEC, FORMATS["bf16"].descriptor, 0))
    none = kernel.submit(hidden[:0], ids[:0], torch.ones(0, 1)).wait()
    assert none.shape == (0, SPEC.hidden_size)
    assert not kernel.moves_packed
    versions = [kernel.capture_version]
    for change in (lambda: kernel.unload(1), lambda: kernel.unload(0)):
        change()
        versions.append(kernel.capture_version)
    assert versions[0] == versions[1] < versions[2], "a graph holds the list of matrices"
    kernel.load(0, expert(SPEC, FORMATS["bf16"].descriptor, 0))
    assert kernel.capture_version > versions[2]
    with pytest.raises(ValueError, match="cannot move expert 0"):
        kernel.packed(0)
    with pytest.raises(RuntimeError, match="no gradient"):
        kernel.submit(hidden.requires_grad_(), ids, torch.ones(2, 1))
