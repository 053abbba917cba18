"""One layer over several kernels: who gets which pairs, and how the results are joined."""

from __future__ import annotations

import pytest
import torch

from kt_core.interfaces import ExpertKernel, ExpertWeights, Ticket
from kt_core.moe.hybrid_experts import HybridExperts
from kt_core.types import Element, Format, MoeSpec

SPEC = MoeSpec(num_experts=5, hidden_size=4, intermediate_size=8)


class FakeKernel(ExpertKernel):
    """Expert e multiplies by ``e + 1``; ``diary`` says what happened, in order."""

    def __init__(self, name: str, resident: set[int], diary: list[str] | None = None) -> None:
        self.spec = SPEC
        self.weight_format = Format(name="fake", element=Element.BF16)
        self.name = name
        self.experts = resident
        self.diary = [] if diary is None else diary
        self.asked: list[torch.Tensor] = []
        self.constant: torch.Tensor | None = None  # what to answer, whatever is asked

    @property
    def bytes_per_expert(self) -> int:
        return 0

    def load(self, expert: int, weights: ExpertWeights) -> None:
        self.experts.add(expert)

    def unload(self, expert: int) -> None:
        self.experts.discard(expert)

    def resident(self) -> frozenset[int]:
        return frozenset(self.experts)

    def submit(
        self, hidden: torch.Tensor, expert_ids: torch.Tensor, weights: torch.Tensor
    ) -> Ticket:
        self.diary.append(f"submit {self.name}")
        self.asked.append(expert_ids.clone())
        outside = expert_ids[(expert_ids < -1) | (expert_ids >= SPEC.num_experts)]
        if len(outside):
            msg = f"expert id {int(outside[0])} is outside -1..{SPEC.num_experts - 1}"
            raise ValueError(msg)
        missing = set(expert_ids.unique().tolist()) - self.experts - {-1}
        if missing:
            msg = f"expert {missing} is not resident on {self.name}"
            raise ValueError(msg)
        return FakeTicket(self, hidden, expert_ids, weights)


class FakeTicket(Ticket):
    def __init__(self, kernel: FakeKernel, *arguments: torch.Tensor) -> None:
        self.kernel = kernel
        self.arguments = arguments

    def wait(self) -> torch.Tensor:
        self.kernel.diary.append(f"wait {self.kernel.name}")
        hidden, ids, weights = self.arguments
        if self.kernel.constant is not None:
            return self.kernel.constant.expand_as(hidden)
        return outputs(hidden, ids, weights).to(hidden.dtype)


def outputs(hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The truth about the fake experts; -1 gives ``0 * hidden``."""
    return (weights * (ids + 1)).sum(-1, keepdim=True) * hidden


def arguments(tokens: int = 6, k: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Small integers, so that every sum is exact."""
    generator = torch.Generator().manual_seed(tokens)
    hidden = torch.randint(-8, 8, (tokens, SPEC.hidden_size), generator=generator).float()
    ids = torch.randint(0, SPEC.num_experts, (tokens, k), generator=generator)
    weights = torch.randint(1, 8, (tokens, k), generator=generator).float()
    return hidden, ids, weights


def test_pairs_go_to_the_kernel_that_holds_the_expert() -> None:
    cold, hot = FakeKernel("cold", {0, 2, 3}), FakeKernel("hot", {1, 4})
    experts = HybridExperts(SPEC, [cold, hot])
    ids = torch.tensor([[0, 1, 2], [4, 4, 1], [3, 0, 3]])
    hidden, _, weights = arguments(tokens=3)
    before = ids.clone()

    got = experts(hidden, ids, weights)

    assert cold.asked[0].tolist() == [[0, -1, 2], [-1, -1, -1], [3, 0, 3]]
    assert hot.asked[0].tolist() == [[-1, 1, -1], [4, 4, 1], [-1, -1, -1]]
    assert torch.equal(got, outputs(hidden, ids, weights))
    assert torch.equal(ids, before), "the caller's ids were changed"


@pytest.mark.parametrize(
    "homes", [[{0, 1, 2, 3, 4}, set()], [set(), {0, 1, 2, 3, 4}], [{1}, {0, 3}, {2, 4}]]
)
def test_the_sum_does_not_depend_on_where_experts_live(homes: list[set[int]]) -> None:
    experts = HybridExperts(SPEC, [FakeKernel(str(i), home) for i, home in enumerate(homes)])
    for tokens in (0, 1, 6):
        hidden, ids, weights = arguments(tokens)
        got = experts(hidden, ids, weights)
        assert got.shape == hidden.shape
        assert torch.equal(got, outputs(hidden, ids, weights))


def test_experts_that_nobody_holds_belong_to_the_first() -> None:
    """They may be loaded after the layer is made."""
    first, second = FakeKernel("first", set()), FakeKernel("second", {1})
    experts = HybridExperts(SPEC, [first, second])
    first.experts |= {0, 2, 3, 4}
    hidden, ids, weights = arguments()
    assert torch.equal(experts(hidden, ids, weights), outputs(hidden, ids, weights))
    assert set(second.asked[0].unique().tolist()) <= {-1, 1}


def test_pairs_that_are_somebody_elses_stay_so() -> None:
    """-1 in the argument must not become the last expert, which ``home[-1]`` is."""
    ids = torch.tensor([[-1, 4, -1], [0, -1, -1], [-1, -1, -1]])
    hidden, _, weights = arguments(tokens=3)
    for homes in ([{0, 1}, {2, 3, 4}], [{2, 3, 4}, {0, 1}]):
        kernels = [FakeKernel(str(i), home) for i, home in enumerate(homes)]
        got = HybridExperts(SPEC, kernels)(hidden, ids, weights)
        assert torch.equal(got, outputs(hidden, ids, weights))
        for kernel, home in zip(kernels, homes, strict=True):
            assert set(kernel.asked[0].unique().tolist()) <= home | {-1}


def test_all_start_before_any_is_waited_for() -> None:
    diary: list[str] = []
    kernels = [
        FakeKernel(name, home, diary) for name, home in {"a": {0, 1, 2, 3}, "b": {4}}.items()
    ]
    HybridExperts(SPEC, kernels)(*arguments())
    assert diary == ["submit a", "submit b", "wait a", "wait b"]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_results_are_added_in_the_order_of_the_kernels(order: tuple[int, ...]) -> None:
    """Float addition is not associative: 1e8 - 1e8 + 1 is 1, 1e8 + 1 - 1e8 is 0."""
    values = [torch.tensor(v) for v in (1e8, -1e8, 1.0)]
    kernels = [FakeKernel(str(i), {i}) for i in order]
    for kernel, index in zip(kernels, order, strict=True):
        kernel.constant = values[index]
    hidden = torch.ones(2, SPEC.hidden_size)
    ids, weights = torch.tensor([[0, 1], [2, 0]]), torch.ones(2, 2)
    got = HybridExperts(SPEC, kernels)(hidden, ids, weights)
    want = values[order[0]] + values[order[1]] + values[order[2]]
    assert torch.equal(got, want.expand_as(got))


def test_refresh_placement_after_a_swap() -> None:
    cold, hot = FakeKernel("cold", {0, 1, 2}), FakeKernel("hot", {3, 4})
    experts = HybridExperts(SPEC, [cold, hot])
    hidden, ids, weights = arguments(tokens=20)
    want = outputs(hidden, ids, weights)
    assert torch.equal(experts(hidden, ids, weights), want)

    for kernel, gone, come in ((cold, 2, 3), (hot, 3, 2)):
        kernel.unload(gone)
        kernel.load(come, ExpertWeights(up=hidden, down=hidden))
    with pytest.raises(ValueError, match="not resident"):
        experts(hidden, ids, weights)  # the layer cannot know yet
    experts.refresh_placement()
    assert torch.equal(experts(hidden, ids, weights), want)
    assert set(cold.asked[-1].unique().tolist()) == {-1, 0, 1, 3}
    assert set(hot.asked[-1].unique().tolist()) == {-1, 2, 4}


def test_one_kernel_gets_the_ids_as_they_are() -> None:
    kernel = FakeKernel("only", {0, 1, 2, 3, 4})
    experts = HybridExperts(SPEC, [kernel])
    experts.refresh_placement()
    hidden, ids, weights = arguments()
    assert torch.equal(experts(hidden, ids, weights), outputs(hidden, ids, weights))
    assert torch.equal(kernel.asked[0], ids)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8])
def test_ids_of_any_integer_type(dtype: torch.dtype) -> None:
    """Torch takes uint8 indices for a mask."""
    kernels = [FakeKernel("a", {0, 1, 2}), FakeKernel("b", {3, 4})]
    hidden, ids, weights = arguments()
    got = HybridExperts(SPEC, kernels)(hidden, ids.to(dtype), weights)
    assert torch.equal(got, outputs(hidden, ids, weights))


@pytest.mark.parametrize("bad", [5, -2, -6])
def test_ids_out_of_range_are_an_error(bad: int) -> None:
    kernels = [FakeKernel("a", {0, 1, 2}), FakeKernel("b", {3, 4})]
    hidden, ids, weights = arguments()
    ids[2, 1] = bad
    with pytest.raises(ValueError, match=rf"expert id {bad} is outside -1\.\.4"):
        HybridExperts(SPEC, kernels)(hidden, ids, weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_pairs_gives_every_expert_by_itself(dtype: torch.dtype) -> None:
    kernels = [FakeKernel("a", {0, 2}), FakeKernel("b", {1, 3, 4})]
    experts = HybridExperts(SPEC, kernels)
    hidden, ids, _ = arguments()
    ids[1, 1] = ids[1, 0]  # the same expert twice
    got = experts.forward_pairs(hidden.to(dtype), ids)
    assert got.dtype is dtype
    assert got.shape == (6, 3, SPEC.hidden_size)
    for token in range(6):
        for slot in range(3):
            want = hidden[token] * (int(ids[token, slot]) + 1)
            assert torch.equal(got[token, slot].float(), want)
    assert experts.forward_pairs(hidden[:0], ids[:0]).shape == (0, 3, SPEC.hidden_size)


def test_a_layer_needs_a_kernel() -> None:
    with pytest.raises(ValueError, match="a layer needs at least one kernel"):
        HybridExperts(SPEC, [])


def test_it_looks_like_a_module_without_parameters() -> None:
    """Nothing to load, to save or to train; PEFT finds a ``weight`` to ask for its device."""
    experts = HybridExperts(SPEC, [FakeKernel("a", {0}), FakeKernel("b", {1})])
    assert list(experts.parameters()) == []
    assert experts.state_dict() == {}
    assert experts.weight.device.type == "cpu"
    assert "5 experts of fake on FakeKernel, FakeKernel" in repr(experts)
