"""Find out which activation an experts module computes, by asking it for values.

A class name says nothing about a formula and a config key little; the module's own ``_apply_gate``
says everything. It has no weights, so it can be called while the model is on the meta device. The
candidates are the activations the kernels know, with the numbers that stand on the module; one that
agrees everywhere on a grid that reaches past every limit is the one. None does: the model is
refused, rather than run wrongly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import nn

from kt_core.errors import UnsupportedModelError
from kt_core.moe.activations import activate
from kt_core.types import UNGATED_KINDS, Activation, ActivationKind


def activation_of(
    module: nn.Module, *, is_gated: bool = True, is_concatenated: bool = True
) -> Activation:
    """Return the activation between the projections of ``module``.

    Raises:
        UnsupportedModelError: It is none of those the kernels compute.
    """
    compute = _computation(module, is_gated=is_gated, is_concatenated=is_concatenated)
    # The model is built under torch.device("meta"): say where these numbers are to be.
    with torch.device("cpu"), torch.no_grad():
        gate, up = _grid()
        wanted = compute(gate, up)
        for candidate in _candidates(module, is_gated=is_gated):
            got = activate(candidate, gate, up if is_gated else None)
            if torch.allclose(got, wanted, rtol=1e-5, atol=1e-6):
                return candidate
    msg = (
        f"{type(module).__name__} computes an activation that is none of "
        f"{', '.join(kind.value for kind in ActivationKind)}. See docs/add-a-model.md."
    )
    raise UnsupportedModelError(msg)


def _grid() -> tuple[torch.Tensor, torch.Tensor]:
    """Gates and ups from small to far beyond any limit in use (7 and 10), both signs."""
    ends = torch.tensor([-60.0, -12, -9, -7.5, 7.5, 9, 12, 60])
    points = torch.cat([torch.linspace(-4, 4, 65), ends])
    gate, up = torch.meshgrid(points, points.flip(0), indexing="ij")
    return gate.flatten(), up.flatten()


def _computation(
    module: Any, *, is_gated: bool, is_concatenated: bool
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """The module's own activation, as a function of gate and up of any length."""
    if not is_gated:
        return lambda gate, _: cast("torch.Tensor", module.act_fn(gate))
    apply_gate = getattr(module, "_apply_gate", None)
    if apply_gate is None:
        return lambda gate, up: cast("torch.Tensor", module.act_fn(gate) * up)

    def fused(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        if is_concatenated:
            out: torch.Tensor = apply_gate(torch.cat([gate, up])[None])
        else:
            out = apply_gate(torch.stack([gate, up], dim=1).flatten()[None])
        return out[0]

    return fused


def _candidates(module: nn.Module, *, is_gated: bool) -> Iterator[Activation]:
    for kind in ActivationKind:
        if kind in UNGATED_KINDS:
            yield Activation(kind=kind, is_gated=is_gated)
    if not is_gated:
        return
    numbers = sorted(_numbers(module))
    for limit in numbers:
        yield Activation(kind=ActivationKind.SWIGLU_CLAMP, limit=limit)
        yield Activation(kind=ActivationKind.SWIGLU_CLAMP_AFTER, limit=limit)
        for other in numbers:
            yield Activation(kind=ActivationKind.SWIGLU_OAI, alpha=other, limit=limit)
            if math.isfinite(limit) and math.isfinite(other):
                yield Activation(kind=ActivationKind.SWIGLU_SOFTCAP, limit=limit, up_limit=other)


def _numbers(module: nn.Module) -> set[float]:
    """Positive numbers that stand on the module or its parts: limits, slopes, caps."""
    return {
        float(value)
        for part in module.modules()
        for value in vars(part).values()
        if isinstance(value, int | float) and not isinstance(value, bool) and value > 0
    } | {1.0}
