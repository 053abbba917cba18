"""Operators on simulated devices: torch's own, in the stream, without waiting where that can be."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kt_sim.device import launch
from kt_sim.native import NativeDevice
from sim.host_calls import Note
from sim.target import only_sim

pytestmark = [pytest.mark.sim, only_sim]


def test_results_are_those_of_the_cpu() -> None:
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    d = x.to("sim")
    for name, function in {
        "product": lambda t: t @ t.T,
        "strided": lambda t: t[:, ::2].contiguous() + t[:, 1::2],
        "topk": lambda t: torch.topk(torch.softmax(t, -1), 2).indices,
        "in place": lambda t: t.clone().mul_(2).add_(1),
        "out": lambda t: torch.add(t, 1, out=torch.empty(0, device=t.device)),
        "number": lambda t: t * 2 + torch.tensor(3.0),
        "cat": lambda t: torch.cat([t, t], dim=1),
        "where": lambda t: torch.where(t > 0, t, -1.0),
        "index": lambda t: t[torch.tensor([2, 0], device=t.device)],
        "mask": lambda t: t[t > 0],
        "nonzero": torch.nonzero,
        "scatter": lambda t: torch.zeros_like(t).scatter_(1, (t > 0).long(), t),
        "index_add": lambda t: t.clone().index_add_(0, torch.zeros(4, device=t.device).int(), t),
        "sort": lambda t: torch.sort(t, dim=1).values,
        "split": lambda t: t.split(3, dim=1)[1] * 1,
        "complex": lambda t: torch.view_as_real(torch.view_as_complex(t.view(4, 4, 2)) * 1j),
        "conv": lambda t: nn.functional.conv1d(t[None], torch.ones(2, 4, 3, device=t.device)),
        "attention": lambda t: nn.functional.scaled_dot_product_attention(*3 * [t[None]]),
        "bf16": lambda t: (t.bfloat16() @ t.bfloat16().T).float(),
        "arange": lambda t: torch.arange(5, device=t.device) * 2,
        "tril": lambda t: torch.tril_indices(3, 3, device=t.device),
        "foreach": lambda t: torch._foreach_mul([t, t], 2.0)[1],
        "unique": lambda t: torch.unique((t > 0).int()),
    }.items():
        assert torch.equal(function(d).cpu(), function(x)), name


def test_operators_do_not_wait() -> None:
    stream, note = torch.Stream("sim"), Note()
    x = torch.randn(8, 8).to("sim")
    note.gate.clear()
    note.launch(stream)
    with stream:
        y = torch.softmax(x @ x + 1, dim=-1)[x.argmax(dim=0)].mean()
    assert not stream.query()
    note.gate.set()
    stream.synchronize()
    assert y.isfinite().item()


def test_what_depends_on_numbers_waits() -> None:
    x = torch.tensor([1.0, 0.0, 2.0]).to("sim")
    assert x.nonzero().shape == (2, 1)
    assert torch.equal(x, x)
    assert x.max().item() == 2


def test_other_devices_are_refused() -> None:
    with pytest.raises(RuntimeError, match=r"found at least two devices, sim:0 and cpu!"):
        torch.ones(2, device="sim") + torch.ones(2)
    with pytest.raises(RuntimeError, match=r"found at least two devices, sim:0 and cpu! \(in"):
        torch.ones(2, device="sim").masked_fill_(torch.ones(2).bool(), 1.0)


def test_indices_may_lie_on_the_host_where_cuda_allows_it() -> None:
    x, index = torch.arange(4.0).to("sim"), torch.tensor([2, 0])
    assert x[index].tolist() == [2, 0]
    x[index] = 7
    assert x.tolist() == [7, 1, 7, 3]
    with pytest.raises(RuntimeError, match="at least two devices, sim:0 and cpu"):
        x.index_select(0, index)


def test_an_error_of_the_caller_is_raised_where_it_was_made() -> None:
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
        torch.ones(2, 3, device="sim") @ torch.ones(2, 3, device="sim")
    torch.accelerator.synchronize()


def test_an_error_in_the_stream_loses_the_device(device: NativeDevice) -> None:
    table = torch.ones(4, 2, device="sim")
    index = torch.tensor([7]).to("sim")
    table[index]  # nobody knows yet
    with pytest.raises(RuntimeError, match=r"sim:0 is lost: operator aten::index.* out of bounds"):
        torch.accelerator.synchronize()
    with pytest.raises(RuntimeError, match="sim:0 is lost"):
        torch.ones(1, device="sim")
    assert torch.ones(1, device="sim:1").item() == 1
    device.revive(0)
    assert table.sum().item() == 8


def test_gradients() -> None:
    torch.manual_seed(3)
    layers = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 4))
    x = torch.randn(5, 8, requires_grad=True)
    layers(x).square().sum().backward()
    want = [p.grad.clone() for p in layers.parameters() if p.grad is not None]
    layers.zero_grad()
    layers.to("sim")
    d = x.detach().to("sim").requires_grad_()
    layers(d).square().sum().backward()
    got = [p.grad for p in layers.parameters()]
    assert all(grad is not None and grad.device.type == "sim" for grad in got)
    for found, wanted in zip(got, want, strict=True):
        assert found is not None
        torch.testing.assert_close(found.cpu(), wanted)
    assert d.grad is not None
    torch.testing.assert_close(d.grad.cpu(), x.grad)


def test_random_numbers_come_from_the_generator_in_the_order_of_the_calls() -> None:
    def draw(generator: torch.Generator | None) -> list[torch.Tensor]:
        return [
            torch.randn(3, device="sim", generator=generator),
            torch.rand(3, device="sim", generator=generator),
            torch.randperm(5, device="sim", generator=generator),
            torch.ones(4, device="sim").bernoulli_(0.5, generator=generator),
        ]

    generator = torch.Generator("sim")
    first = draw(generator.manual_seed(3))
    again = draw(generator.manual_seed(3))
    other = draw(generator.manual_seed(4))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    assert not torch.equal(torch.randn(3, device="sim", generator=generator), other[0])
    torch.manual_seed(5)  # every device's own generator
    default = draw(None)
    torch.manual_seed(5)
    assert all(torch.equal(a, b) for a, b in zip(default, draw(None), strict=True))
    with pytest.raises(RuntimeError, match="device type for generator"):
        torch.randn(3, device="sim", generator=torch.Generator())


def test_the_state_of_random_numbers_is_kept_and_given_back() -> None:
    with torch.random.fork_rng(devices=[0, 1], device_type="sim"):
        inside = torch.randn(3, device="sim")
    assert torch.equal(torch.randn(3, device="sim"), inside)


def test_calls_leave_nothing_behind() -> None:
    layer = nn.Linear(64, 64).to("sim")
    x = torch.randn(8, 64).to("sim")

    def step() -> None:
        y = layer(x)
        y.sum().backward()
        layer.zero_grad(set_to_none=True)
        x.nonzero()
        torch.accelerator.synchronize()

    step()
    held = torch.accelerator.memory_allocated(0)
    reserved = torch.accelerator.memory_reserved(0)
    for _ in range(20):
        step()
    assert torch.accelerator.memory_allocated(0) == held
    assert torch.accelerator.memory_reserved(0) == reserved


# --8<-- [start:kernel]
def double(x: torch.Tensor) -> torch.Tensor:
    """Put a kernel into the current stream of x's device."""

    def kernel(source: torch.Tensor, target: torch.Tensor) -> tuple[float, float, bool]:
        torch.mul(source, 2, out=target)  # both on the CPU, over the device's bytes
        return source.nbytes + target.nbytes, source.numel(), False

    out = torch.empty_like(x)
    launch(kernel, [x, out], "double")
    return out


# --8<-- [end:kernel]


def test_a_kernel_of_ones_own(device: NativeDevice) -> None:
    x = torch.arange(4.0).to("sim")
    stream = torch.Stream("sim")
    graph = torch.accelerator.Graph()
    with stream, graph:
        y = double(x)
    x.fill_(5)
    graph.replay()
    torch.accelerator.synchronize()
    assert y.tolist() == [10, 10, 10, 10]
    with pytest.raises(RuntimeError, match="all tensors of kernel double must be on one simulated"):
        launch(lambda *_: (0, 0, False), [x, torch.ones(1)], "double")

    def broken(_: torch.Tensor) -> tuple[float, float, bool]:
        msg = "not like this"
        raise ValueError(msg)

    launch(broken, [x], "broken")
    with pytest.raises(RuntimeError, match="kernel broken failed: ValueError: not like this"):
        torch.accelerator.synchronize()
    device.revive(0)
