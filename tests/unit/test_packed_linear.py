"""``PackedLinear`` and the operator ``kt::packed_linear``: traced, differentiated, checkpointed."""

from __future__ import annotations

import gc

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from kt_core.dense.differentiable import number_of, packed_linear, packed_linear_backward
from kt_core.dense.packed_linear import PackedLinear
from kt_core.errors import UnsupportedTrainingError
from kt_core.quant import BUILT_IN_FORMATS
from kt_core.testing import ReferenceLinear, reference_linear
from kt_core.types import LinearSpec

FORMATS = {f.descriptor.name: f for f in BUILT_IN_FORMATS}
SPEC = LinearSpec(in_features=12, out_features=10, has_bias=True)


class ExactLinear(ReferenceLinear):
    """Rounds nothing: float64 weights, activations and results."""

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        layer = self._loaded()
        return torch.nn.functional.linear(x, layer.weight, layer.bias)

    apply_training = apply

    def grad_input(self, grad_out: torch.Tensor) -> torch.Tensor:
        return grad_out @ self._loaded().weight


class CountsCalls(ReferenceLinear):
    calls: tuple[str, ...] = ()

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += ("apply",)
        return super().apply(x)

    def apply_training(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += ("apply_training",)
        return super().apply_training(x)


class Untrained(ReferenceLinear):
    trains = False


def loaded(
    kernel_class: type[ReferenceLinear] = ExactLinear, name: str = "bf16"
) -> ReferenceLinear:
    kernel = kernel_class(SPEC, FORMATS[name])
    kernel.load(*reference_linear.random_linear(SPEC, torch.Generator().manual_seed(0)))
    return kernel


def rows(dtype: torch.dtype = torch.float64, shape: tuple[int, ...] = (2, 3, 12)) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def test_gradcheck() -> None:
    layer = PackedLinear(loaded(), torch.float64)
    assert torch.autograd.gradcheck(layer, (rows().requires_grad_(),))


def test_opcheck() -> None:
    kernel = loaded()
    for x in (rows(), rows(shape=(0, 12)), rows().requires_grad_()):
        torch.library.opcheck(packed_linear, (x, number_of(kernel)))
    torch.library.opcheck(packed_linear_backward, (rows(shape=(4, 10)), number_of(kernel)))


def test_compiles_in_one_graph() -> None:
    layer = PackedLinear(loaded(), torch.float64)
    compiled = torch.compile(lambda x: torch.tanh(layer(x)).sum(), fullgraph=True, backend="eager")
    grads = []
    for run in (compiled, lambda x: torch.tanh(layer(x)).sum()):
        x = rows().requires_grad_()
        run(x).backward()
        assert x.grad is not None
        grads.append(x.grad)
    assert torch.equal(*grads)


def test_checkpointing_computes_the_same_numbers() -> None:
    """int8 activations are never a training pass's own choice, in neither of its two runs."""
    layer = PackedLinear(loaded(ReferenceLinear, "int8"), torch.float32).train()
    results = []
    for with_checkpoint in (False, True):
        x = rows(torch.float32).requires_grad_()
        out = checkpoint(layer, x, use_reentrant=False) if with_checkpoint else layer(x)
        out.square().sum().backward()
        assert x.grad is not None
        results.append((out.detach(), x.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_the_kernel_is_called_without_the_operator_where_nothing_needs_it() -> None:
    kernel = loaded(CountsCalls)
    assert isinstance(kernel, CountsCalls)
    layer = PackedLinear(kernel, torch.float32).eval()
    x = rows(torch.float32)
    layer(x)
    with torch.no_grad():
        layer(x.requires_grad_())
    assert kernel.calls == ("apply", "apply")
    layer(x)
    assert kernel.calls[2:] == ("apply_training",)
    with torch.no_grad():  # the first pass of gradient checkpointing
        layer.train()(x)
    assert kernel.calls[3:] == ("apply_training",)


def test_kernels_that_do_not_train_say_so() -> None:
    layer = PackedLinear(loaded(Untrained), torch.float32).train()
    x = rows(torch.float32).requires_grad_()
    with pytest.raises(UnsupportedTrainingError, match=r"Untrained has no gradient .*'bf16'"):
        layer(x)
    with torch.no_grad():
        assert layer(x).shape == (2, 3, 10)


def test_weight_and_bias_look_right_and_poison_what_computes_with_them() -> None:
    layer = PackedLinear(loaded(), torch.bfloat16)
    assert not layer.was_read
    assert layer.weight.shape == (10, 12)
    assert layer.weight.dtype is torch.bfloat16
    assert layer.weight.untyped_storage().nbytes() == 2
    assert layer.was_read
    assert layer.bias is not None
    assert layer.bias.shape == (10,)
    assert bool((rows(torch.bfloat16) @ layer.weight.T).isnan().all())
    assert not list(layer.parameters())
    assert not layer.state_dict()
    assert PackedLinear(ExactLinear(LinearSpec(in_features=2, out_features=3), FORMATS["bf16"]),
                        torch.float32).bias is None  # fmt: skip


def test_it_describes_itself() -> None:
    text = repr(PackedLinear(loaded(), torch.float32))
    assert "in_features=12, out_features=10, bias=True, bf16 on ExactLinear" in text


def test_numbers_keep_no_kernel_alive() -> None:
    kernel = loaded()
    number = number_of(kernel)
    del kernel
    gc.collect()
    with pytest.raises(RuntimeError, match=rf"dense layers numbered {number} are gone"):
        packed_linear(rows(), number)
