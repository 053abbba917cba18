"""What is decided on the device: whose a pair is, and which experts are there."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from gpu.test_numbers import BF16, FLOAT32, FORMATS, SMALL, both, loaded, there
from kt_core.testing import reference
from kt_core.testing.backend_harness import Pairs, is_within, random_layer, random_pairs, worst_of
from kt_triton import launch
from kt_triton.kernel import TritonExpertKernel
from kt_triton.launch import Call

LAYER = replace(SMALL, num_experts=4)
FOREIGN = -(1 << 40)  # an id of which 32 bits would be 0


def call_of(kernel: TritonExpertKernel, pairs: Pairs) -> Call:
    hidden, ids, weights = there(pairs)
    return Call(hidden, ids, weights, kernel.table, torch.empty_like(hidden))


def compute(kernel: TritonExpertKernel, call: Call, *, is_few: bool) -> torch.Tensor:
    """Start the kernels as a GPU's host does, which cannot look at ids."""
    call.out.fill_(float("nan"))
    launch.compute(kernel._layer, call, FLOAT32, is_few=is_few)
    return call.out.cpu()


@both
def test_pairs_that_are_not_ours_add_nothing(is_few: bool) -> None:
    """Ids of -1 and beyond the experts, and experts that are not resident; with any weight."""
    weight_format = FORMATS["int4-g32"]
    kernel = loaded(LAYER, weight_format, FLOAT32, is_few=is_few)
    kernel.unload(2)
    ids = torch.tensor(
        [[1, 1, 3], [-1, 2, LAYER.num_experts], [0, FOREIGN, 0], [2, 3, 1 << 40], [2, 2, 2]]
    )
    pairs = random_pairs(LAYER, len(ids), k=3)
    is_ours = (ids >= 0) & (ids < LAYER.num_experts) & (ids != 2)
    weights = pairs.weights.where(is_ours, float("inf"))
    call = call_of(kernel, replace(pairs, expert_ids=ids, weights=weights))
    got = compute(kernel, call, is_few=is_few)
    layer = reference.layer(LAYER, weight_format, random_layer(LAYER))
    known = ids.where(is_ours, -1)
    want, allowed = reference.forward(layer, pairs.hidden, known, pairs.weights, FLOAT32)
    assert is_within(got, want, allowed), worst_of(got, want, allowed)
    assert bool((got[[1, 4]] == 0).all())


@both
def test_swaps_are_seen_without_a_new_launch(is_few: bool) -> None:
    """A graph that was captured replays the same arguments: only the table tells of a swap."""
    weight_format = FORMATS["mxfp4"]
    kernel = loaded(LAYER, weight_format, FLOAT32, is_few=is_few)
    packed = {expert: kernel.packed(expert).clone() for expert in kernel.resident()}
    pairs = random_pairs(LAYER, 7)
    call = call_of(kernel, pairs)
    experts = random_layer(LAYER)
    first = compute(kernel, call, is_few=is_few).clone()
    kernel.unload(1)
    kernel.unload(3)
    kernel.load_packed(3, packed[0])
    swapped = {0: experts[0], 2: experts[2], 3: experts[0]}
    layer = reference.layer(LAYER, weight_format, swapped)
    want, allowed = reference.forward(layer, pairs.hidden, pairs.expert_ids, pairs.weights, FLOAT32)
    got = compute(kernel, call, is_few=is_few)
    assert is_within(got, want, allowed), worst_of(got, want, allowed)
    for expert in (1, 3):
        kernel.load_packed(expert, packed[expert])
    assert torch.equal(compute(kernel, call, is_few=is_few), first), "an expert that came back"


@both
def test_in_turns(is_few: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """More tokens than the workspace holds are computed in turns: 4, 4 and 3 of them here."""
    weight_format = FORMATS["int8-g32"]
    kernel = loaded(LAYER, weight_format, FLOAT32, is_few=is_few)
    pairs = random_pairs(LAYER, 11)
    call = call_of(kernel, pairs)
    monkeypatch.setattr(launch, "WORKSPACE_BYTES", 4 * 2 * 4 * (48 + LAYER.hidden_size))
    got = compute(kernel, call, is_few=is_few)
    layer = reference.layer(LAYER, weight_format, random_layer(LAYER))
    want, allowed = reference.forward(layer, pairs.hidden, pairs.expert_ids, pairs.weights, FLOAT32)
    assert is_within(got, want, allowed), worst_of(got, want, allowed)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
@both
def test_types_of_ids_and_weights(dtype: torch.dtype, is_few: bool) -> None:
    """As they come: nothing is converted in between."""
    kernel = loaded(LAYER, FORMATS["bf16"], BF16, is_few=is_few)
    pairs = random_pairs(LAYER, 4, dtype=torch.bfloat16)
    hidden, ids, weights = there(pairs)
    weights = weights.half()
    want = kernel.submit(hidden, ids, weights.float()).wait()
    got = kernel.submit(hidden, ids.to(dtype), weights).wait()
    assert torch.equal(got, want)
