"""Modules that a block calls beside its experts, such as shared experts, run at the same time.

A block of a model calls them before its experts or after, with the hidden states that the experts
get. In the one stream of the model they would run before the host is asked for its experts, or
after it was waited for. Hooks of torch's modules put them into a stream of their own instead:

- what is called *after* the experts begins where the experts began, since what it reads was there;
- what is called *before* them is waited for behind them, since nobody reads its output before.

Whether both is so, of a family that nobody here knows, is found out: one pass of the model is
watched, operator by operator. A module is moved only if between the two points no operator wrote to
its input, and none touched its output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kt_core.moe.hybrid_experts import HybridExperts
from kt_core.moe.timeline import Kind, Label, Mark, Timeline

# What is smaller than this part of an expert takes less time than two events do.
_SMALLEST = 1 / 8


class Order(Enum):
    """When a block calls a module that can be moved."""

    BEFORE = auto()  # before the experts, and reads the output after them
    AFTER = auto()  # after the experts, on what these read


@dataclass(frozen=True, slots=True)
class _Block:
    """A block that holds experts, and the other modules that it calls."""

    module: nn.Module
    experts: HybridExperts
    siblings: tuple[nn.Module, ...]


@dataclass(slots=True)
class _Call:
    """A call that is watched: how many operators were before it and until its end, and its ends."""

    begin: int
    arguments: tuple[Any, ...]
    end: int = -1
    output: Any = None  # kept, as are the arguments, so that their memory becomes nobody else's


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes which memory operators touch and write, and which modules are called in between."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.touched: list[set[int]] = []  # by operator
        self.written: list[set[int]] = []
        self.calls: dict[nn.Module, list[_Call]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        kwargs = kwargs or {}
        touched, written = set(), set()
        for argument, value in _arguments(func, args, kwargs):
            memory = set(_memory_of(value))
            touched |= memory
            if argument.alias_info is not None and argument.alias_info.is_write:
                written |= memory
        self.touched.append(touched)
        self.written.append(written)
        return func(*args, **kwargs)

    def begins(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Note a call: a forward pre-hook."""
        call = _Call(len(self.touched), (*args, *kwargs.values()))
        self.calls.setdefault(module, []).append(call)

    def ends(self, module: nn.Module, args: Any, output: Any) -> None:
        """Note its end: a forward hook."""
        del args
        call = self.calls[module][-1]
        call.end, call.output = len(self.touched), output


def _arguments(func: Any, args: Any, kwargs: Any) -> Iterator[tuple[Any, Any]]:
    for index, argument in enumerate(func._schema.arguments):
        if index < len(args):
            yield argument, args[index]
        elif argument.name in kwargs:
            yield argument, kwargs[argument.name]


def _memory_of(value: Any) -> list[int]:
    tensors = (leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor))
    return [tensor.untyped_storage().data_ptr() for tensor in tensors]


def _order_of(sibling: nn.Module, experts: nn.Module, watch: _Watch) -> Order | None:
    """Say when a module was called; None where it cannot be moved."""
    calls, of_experts = watch.calls.get(sibling, []), watch.calls.get(experts, [])
    if len(calls) != 1 or len(of_experts) != 1:
        return None
    (call,), (routed,) = calls, of_experts
    inputs, outputs = set(_memory_of(call.arguments)), set(_memory_of(call.output))
    if inputs & outputs:
        return None
    if call.end <= routed.begin:
        is_read = any(outputs & memory for memory in watch.touched[call.end : routed.end])
        is_written = any(inputs & memory for memory in watch.written[call.begin : routed.end])
        return None if is_read or is_written else Order.BEFORE
    is_written = any(inputs & memory for memory in watch.written[routed.begin : call.end])
    is_later = call.begin >= routed.end and inputs == set(_memory_of(routed.arguments[:1]))
    return Order.AFTER if is_later and not is_written else None


class BesideStream:
    """The stream of the modules of one model that run beside its experts.

    Attributes:
        orders: When each of them is called by its block.
        timeline: Where they are noted; None for nowhere.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        """Start with none; ``move`` adds them.

        Args:
            model: The whole model.
            device: Where its hidden states are.
        """
        # Its modules hold this by their hooks: held in turn, all would outlive their last user.
        self.orders: WeakKeyDictionary[nn.Module, Order] = WeakKeyDictionary()
        self.timeline: Timeline | None = None
        self._label = Label(Kind.BESIDE, f"{device} beside experts", "shared experts")
        self._noted: Mark | None = None
        self._device = device
        self._stream = torch.Stream(device=device)
        self._is_away = False
        self._began: torch.Event | None = None
        self._hidden: list[int] = []
        self._pending: list[tuple[torch.Event, Any]] = []
        model.register_forward_pre_hook(self._model_begins)

    def move(self, block: _Block, orders: dict[nn.Module, Order]) -> None:
        """Hook modules of a block into the stream; the hooks live as long as the modules."""
        self.orders |= orders
        block.experts.register_forward_pre_hook(self._experts_begin)
        block.experts.register_forward_hook(self._join, always_call=True)
        block.module.register_forward_hook(self._block_ends, always_call=True)
        for sibling in orders:
            sibling.register_forward_pre_hook(self._sibling_begins, with_kwargs=True)
            sibling.register_forward_hook(self._sibling_ends, with_kwargs=True, always_call=True)

    def _model_begins(self, *_: Any) -> None:
        """Come back from where Ctrl-C hit an earlier pass: no hook is called for that."""
        if self._is_away:
            self._stream.__exit__(None, None, None)
            self._is_away = False
        self._join()

    def _experts_begin(self, module: nn.Module, args: Any) -> None:
        del module
        self._began = torch.accelerator.current_stream(self._device).record_event()
        self._hidden = _memory_of(args[:1])

    def _sibling_begins(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if torch.is_grad_enabled():
            return
        begin: torch.Event | None = None
        if self.orders[module] is Order.BEFORE:
            begin = torch.accelerator.current_stream(self._device).record_event()
        elif _memory_of((args, kwargs)) == self._hidden:
            begin = self._began
        if begin is not None:
            self._stream.wait_event(begin)
            self._is_away = True
            self._stream.__enter__()
            if self.timeline is not None and self.timeline.step >= 0:
                self._noted = self.timeline.mark(self._stream)

    def _sibling_ends(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if not self._is_away:
            return
        if self.timeline is not None and self._noted is not None:
            self.timeline.between(self._noted, self.timeline.mark(self._stream), self._label)
        self._noted = None
        self._stream.__exit__(None, None, None)
        self._is_away = False
        stream = torch.accelerator.current_stream(self._device)
        for leaf in tree_leaves(output):
            if isinstance(leaf, torch.Tensor):
                leaf.record_stream(stream)
        # What it reads must not become somebody else's memory before.
        self._pending.append((self._stream.record_event(), (args, kwargs)))
        if self.orders[module] is Order.AFTER:
            self._join()

    def _join(self, *_: Any) -> None:
        stream = torch.accelerator.current_stream(self._device)
        for event, _ in self._pending:
            stream.wait_event(event)
        self._pending.clear()

    def _block_ends(self, *_: Any) -> None:
        self._began, self._hidden = None, []


def run_beside_experts(
    model: nn.Module, device: torch.device, try_out: Callable[[], None]
) -> BesideStream | None:
    """Let what the blocks of a model call beside their experts run in a stream of its own.

    Args:
        model: With its experts replaced; on ``device``.
        device: Where the hidden states are.
        try_out: Runs the model once, on anything.

    Returns:
        The stream; None where there is nothing to move.
    """
    blocks = list(_blocks_of(model))
    if not blocks:
        return None
    watch = _watched(model, blocks, try_out)
    beside: BesideStream | None = None
    for block in blocks:
        found = {s: _order_of(s, block.experts, watch) for s in block.siblings}
        orders = {sibling: order for sibling, order in found.items() if order is not None}
        if orders:
            beside = beside or BesideStream(model, device)
            beside.move(block, orders)
    return beside


def _blocks_of(model: nn.Module) -> Iterator[_Block]:
    """Yield those that have something beside their experts that is worth moving."""
    for name, experts in model.named_modules():
        if not isinstance(experts, HybridExperts):
            continue
        block = model.get_submodule(name.rpartition(".")[0])
        least = _SMALLEST * experts.spec.weights_per_expert
        siblings = tuple(
            child
            for child in block.children()
            if child is not experts and sum(p.numel() for p in child.parameters()) >= least
        )
        if siblings:
            yield _Block(block, experts, siblings)


def _watched(model: nn.Module, blocks: Sequence[_Block], try_out: Callable[[], None]) -> _Watch:
    watch = _Watch()
    handles = []
    for block in blocks:
        for module in (block.experts, *block.siblings):
            handles.append(module.register_forward_pre_hook(watch.begins, with_kwargs=True))
            handles.append(module.register_forward_hook(watch.ends))
    # What is tried out is nobody's prompt.
    everywhere = [module for module in model.modules() if isinstance(module, HybridExperts)]
    counts = [experts.counts for experts in everywhere]
    try:
        for experts in everywhere:
            experts.counts = None
        with torch.no_grad(), watch:
            try_out()
    finally:
        for handle in handles:
            handle.remove()
        for experts, count in zip(everywhere, counts, strict=True):
            experts.counts = count
    return watch
