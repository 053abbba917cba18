"""Small layers made of what transformer layers are made of, to time the cost of calls.

Norms in float32, rotary embeddings, a cache that grows, routing: the operators and the nesting of
modules are those of common decoders, the sizes are next to nothing. Between them each layer reads a
large matrix, as models do: what an interpreter needs is then no longer in the processor's caches,
which makes a call two to three times as long.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import nn
from torch.nn import functional

Experts: TypeAlias = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Computes ``[tokens, hidden]`` from hidden states, expert ids and weights."""

EXTRA_PRODUCTS = 4
LARGE = 2048
HIDDEN, NUM_EXPERTS = 64, 16
_HEADS, _TOP_K = 4, 4


class _Norm(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(HIDDEN, dtype=dtype))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        wide = hidden.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * wide.to(hidden.dtype)


class _Mixer(nn.Module):
    """What stands around attention: projection, heads, rotation, a cache."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.past: torch.Tensor
        self.project = nn.Linear(HIDDEN, HIDDEN, bias=False, dtype=dtype)
        self.register_buffer("past", torch.ones((1, _HEADS, 8, HIDDEN // _HEADS), dtype=dtype))

    def forward(self, hidden: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
        heads = self.project(hidden).view(1, 1, _HEADS, -1).transpose(1, 2)
        first, second = heads.chunk(2, dim=-1)
        turned = torch.cat((-second, first), dim=-1)
        heads = heads * angles.cos().to(heads.dtype) + turned * angles.sin().to(heads.dtype)
        seen = torch.cat((self.past, heads), dim=2)
        return seen[:, :, -1:].transpose(1, 2).reshape(1, 1, HIDDEN).contiguous()


class _Router(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bias: torch.Tensor
        self.weight = nn.Parameter(torch.ones((NUM_EXPERTS, HIDDEN)))
        self.register_buffer("bias", torch.zeros(NUM_EXPERTS))

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = hidden.view(-1, HIDDEN)
        scores = functional.linear(hidden.to(torch.float32), self.weight).sigmoid()
        chosen = torch.topk(scores + self.bias.unsqueeze(0), _TOP_K, dim=-1, sorted=False)[1]
        weights = scores.gather(1, chosen)
        return chosen, weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)


class _Layer(nn.Module):
    def __init__(
        self, large: nn.Linear, extra_products: int, dtype: torch.dtype, experts: Experts | None
    ) -> None:
        super().__init__()
        self.large = large
        self.experts = experts
        self.before, self.after = _Norm(dtype), _Norm(dtype)
        self.mixer, self.router = _Mixer(dtype), _Router()
        self.more = nn.ModuleList(
            nn.Linear(HIDDEN, HIDDEN, bias=False, dtype=dtype) for _ in range(extra_products)
        )

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        self.large(hidden.new_ones((1, LARGE)))
        angles = torch.ones((1, 1, 1, HIDDEN // _HEADS), device=hidden.device)
        hidden = hidden + self.mixer(self.before(hidden), angles)
        residual = hidden
        hidden = self.after(hidden)
        chosen, weights = self.router(hidden)
        if self.experts is not None:
            hidden = self.experts(hidden.view(-1, HIDDEN), chosen, weights).view(1, 1, HIDDEN)
        for module in self.more:
            hidden = module(hidden)
        hidden = functional.silu(hidden) * weights.sum(dim=-1, keepdim=True).to(hidden.dtype)
        return residual + hidden


class Stream(nn.Module):
    """The large matrices alone."""

    def __init__(self, large: Sequence[nn.Linear]) -> None:
        """Take the layers of ``large_layers``."""
        super().__init__()
        self.large = nn.ModuleList(large)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Read them all."""
        for module in self.large:
            module(hidden.new_ones((1, LARGE)))
        return hidden


def large_layers(depth: int, dtype: torch.dtype) -> list[nn.Linear]:
    """Return that many large layers; time does not depend on what is in them."""
    layers = []
    for _ in range(depth):
        layer: nn.Linear = nn.utils.skip_init(  # type: ignore[no-untyped-call]
            nn.Linear, LARGE, LARGE, bias=False, dtype=dtype
        )
        nn.init.constant_(layer.weight, 1 / LARGE)  # writes: untouched pages are not memory yet
        layers.append(layer)
    return layers


def stack(
    large: Sequence[nn.Linear],
    dtype: torch.dtype,
    *,
    extra_products: int = 0,
    experts: Experts | None = None,
) -> nn.Module:
    """Return a small layer around each of the large ones; they take and give ``[1, 1, 64]``."""
    layers = (_Layer(module, extra_products, dtype, experts) for module in large)
    return nn.Sequential(*layers).eval()
