"""The split model computes what the dense one does, and its routers choose well."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import pytest
import torch
from transformers import Glm4MoeForCausalLM, LlamaForCausalLM

from demo import tiny_dense as tiny
from kt_demo.checkpoint import moe_config, moe_tensors
from kt_demo.recipe import MoeShape
from kt_demo.router import LOGIT_LIMIT, fit_router
from kt_demo.split import LayerSplit, split_model

BFLOAT16_ROUNDING = 2.0**-8  # largest relative error of rounding to 8 significant bits


def token_rows(seed: int, rows: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(len(tiny.TOKENS), (rows, 64), generator=generator)


@cache
def splits() -> list[LayerSplit]:
    return split_model(tiny.model(), token_rows(1, rows=16), tiny.SHAPE, seed=0)


def moe(
    dense: LlamaForCausalLM, layers: Sequence[LayerSplit], shape: MoeShape, dtype: torch.dtype
) -> Glm4MoeForCausalLM:
    """Build the split model in memory: packed expert tensors, as transformers holds them."""
    config = moe_config(dense.config, shape)
    model = Glm4MoeForCausalLM(config).to(dtype)
    model.set_experts_implementation("eager")  # the fast ones know no float64
    tensors = moe_tensors(dense, layers, dtype=dtype)
    state = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    for layer in range(len(layers)):
        name = f"model.layers.{layer}.mlp.experts."
        gates, ups, downs = (
            [tensors[f"{name}{e}.{part}_proj.weight"] for e in range(shape.num_experts)]
            for part in ("gate", "up", "down")
        )
        state[name + "gate_up_proj"] = torch.stack(
            [torch.cat(pair) for pair in zip(gates, ups, strict=True)]
        )
        state[name + "down_proj"] = torch.stack(downs)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert missing == ["lm_head.weight"], missing
    assert not unexpected
    model.tie_weights()
    return model.eval()


@torch.no_grad()
def log_probabilities(model: torch.nn.Module, rows: torch.Tensor) -> torch.Tensor:
    return model(rows).logits.log_softmax(dim=-1)


def divergence(dense: torch.Tensor, other: torch.Tensor) -> float:
    """Mean KL(dense || other) in nats per token."""
    return (dense.exp() * (dense - other)).sum(dim=-1).mean().item()


def with_routers(layers: Sequence[LayerSplit], seed: int | None) -> list[LayerSplit]:
    """Replace the routers by random ones of the same scale, or by zeros for None."""
    if seed is None:
        return [replace(split, router=torch.zeros_like(split.router)) for split in layers]
    torch.manual_seed(seed)
    return [
        replace(split, router=torch.randn_like(split.router) * split.router.std())
        for split in layers
    ]


def test_every_neuron_has_exactly_one_place() -> None:
    for split in splits():
        assert split.shared.shape == (192 - 8 * 16,)
        assert split.experts.shape == (8, 16)
        everywhere = torch.cat([split.shared, split.experts.flatten()])
        assert everywhere.sort().values.tolist() == list(range(192))


def test_router_logits_reach_their_limit_and_no_further() -> None:
    generator = torch.Generator().manual_seed(4)
    hidden, mass = (
        torch.randn(200, 16, generator=generator),
        torch.rand(200, 4, generator=generator),
    )
    logits = hidden @ fit_router(hidden, mass).T
    assert logits.abs().max().item() == pytest.approx(LOGIT_LIMIT, rel=1e-5)
    assert logits.mean(dim=1).abs().max() < 1e-6 * LOGIT_LIMIT * 16, "common part taken out"


def test_splitting_leaves_the_dense_model_as_it_was() -> None:
    dense = tiny.model()
    before = log_probabilities(dense, token_rows(2, rows=1))
    split_model(dense, token_rows(1, rows=2), tiny.SHAPE, seed=0)
    assert torch.equal(log_probabilities(dense, token_rows(2, rows=1)), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_weights_on_all_experts_give_the_dense_model(dtype: torch.dtype) -> None:
    """Sixteen scores of 0.5 normalise to weights of exactly 1: only the order of sums differs.

    So the error may be no larger than the dense model's own rounding error, which the same
    model in float64 shows; each run has one, hence twice, and twice again because the largest
    of two samples is compared.
    """
    dense, rows = tiny.model(), token_rows(2, rows=4)
    split = moe(dense, with_routers(splits(), None), tiny.SHAPE, dtype)
    with torch.no_grad():
        got = split(rows).logits.double()
        rounded = dense(rows).logits.double()
        exact = dense.double()(rows).logits
    allowed = 4 * (rounded - exact).abs().max()
    if dtype is torch.float64:
        allowed *= torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    assert (got - exact).abs().max() <= allowed


@torch.no_grad()
def test_routing_at_top_k_of_all_costs_less_than_bfloat16() -> None:
    """The routers' own weights change a layer by at most max|w - 1| of what its experts add.

    In float64, where rounding is 1e-9 of that; the router itself always computes in float32.
    """
    dense = tiny.model().double()
    split = moe(dense, splits(), tiny.SHAPE, torch.float64)
    hidden = torch.nn.functional.rms_norm(
        torch.randn(500, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(5)), (32,)
    )
    for dense_layer, layer, cut in zip(
        dense.model.layers, split.model.layers, splits(), strict=True
    ):
        mlp = dense_layer.mlp
        _, weights, _ = layer.mlp.gate(hidden)
        deviation = (weights - 1).abs().max().double()
        assert 0 < deviation < BFLOAT16_ROUNDING  # and half of it where the router was fitted
        activation = mlp.act_fn(mlp.gate_proj(hidden)) * mlp.up_proj(hidden)
        parts = [activation[:, n] @ mlp.down_proj.weight[:, n].T for n in cut.experts]
        allowed = deviation * torch.stack(parts).abs().sum(dim=0) * (1 + 1e-9) + 1e-12
        assert ((layer.mlp(hidden[None])[0] - mlp(hidden)).abs() <= allowed).all()


@pytest.mark.parametrize("top_k", [2, 4, 6])
def test_routers_choose_better_than_chance(top_k: int) -> None:
    dense, rows = tiny.model(), token_rows(2, rows=8)
    shape = replace(tiny.SHAPE, top_k=top_k)
    wanted = log_probabilities(dense, rows)

    def loss(layers: Sequence[LayerSplit]) -> float:
        got = log_probabilities(moe(dense, layers, shape, torch.float32), rows)
        return divergence(wanted, got)

    fitted = loss(splits())
    by_chance = [loss(with_routers(splits(), seed)) for seed in range(5)]
    assert fitted < min(by_chance), (fitted, by_chance)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (MoeShape(num_experts=12, expert_neurons=16, top_k=1), "leave 0 of 192"),
        (MoeShape(num_experts=3, expert_neurons=50, top_k=1), "leave 42 of 192"),
    ],
)
def test_shapes_without_a_whole_shared_expert_are_refused(shape: MoeShape, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        split_model(tiny.model(), token_rows(1, rows=1), shape, seed=0)


@pytest.mark.parametrize("top_k", [0, 9])
def test_top_k_out_of_range_is_refused(top_k: int) -> None:
    with pytest.raises(ValueError, match=r"top_k must be in 1\.\.num_experts=8"):
        MoeShape(num_experts=8, expert_neurons=16, top_k=top_k)
