"""``kt_core.moe.activations.activate`` in Triton, in float32."""

from __future__ import annotations

import triton
import triton.language as tl

_SQRT_HALF = tl.constexpr(0.7071067811865476)
_TWICE_SQRT_2_PI = tl.constexpr(1.5957691216057308)  # 2 sqrt(2 / pi)
_ALL = tl.constexpr(tl.PropagateNan.ALL)


@triton.jit
def _tanh(x):
    """To some 2 ulp: an odd polynomial where the quotient of exponentials would cancel.

    Its coefficients minimise the relative error on 0..0.65: below 1e-8, before rounding.
    """
    z = x * x
    tail = -0.005528633948415518 * z + 0.020483316853642464
    tail = (tail * z - 0.05369296669960022) * z + 0.1333089917898178
    near = x + x * z * (tail * z - 0.3333326280117035)
    e = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    return tl.where(tl.abs(x) < 0.65, near, tl.where(x < 0, -far, far))


@triton.jit
def _clamp(x, limit):
    upper = tl.minimum(x, limit, propagate_nan=_ALL)
    return tl.maximum(upper, -limit, propagate_nan=_ALL)


@triton.jit
def activate(gate, up, ACTIVATION: tl.constexpr):
    """Return what the down projection gets; ``gate`` is the up output where there is no gate.

    Args:
        gate: float32.
        up: float32, of the same shape; not read where there is no gate.
        ACTIVATION: A ``kt_core.types.Activation``.
    """
    limit: tl.constexpr = ACTIVATION.limit
    if ACTIVATION.kind == "swiglu_clamp":
        bounded = tl.minimum(gate, limit, propagate_nan=_ALL)
        return bounded * tl.sigmoid(bounded) * _clamp(up, limit)
    elif ACTIVATION.kind == "swiglu_clamp_after":
        swish = tl.minimum(gate * tl.sigmoid(gate), limit, propagate_nan=_ALL)
        return swish * _clamp(up, limit)
    elif ACTIVATION.kind == "swiglu_oai":
        bounded = tl.minimum(gate, limit, propagate_nan=_ALL)
        swish = bounded * tl.sigmoid(ACTIVATION.alpha * bounded)
        return swish * (_clamp(up, limit) + 1.0)
    elif ACTIVATION.kind == "swiglu_softcap":
        capped_up = _tanh(up / ACTIVATION.up_limit) * ACTIVATION.up_limit
        return _tanh(gate / limit) * limit * tl.sigmoid(gate) * capped_up
    else:
        return _plain(gate, ACTIVATION) * up if ACTIVATION.is_gated else _plain(gate, ACTIVATION)


@triton.jit
def _plain(x, ACTIVATION: tl.constexpr):
    """The kinds that also exist without a gate."""
    if ACTIVATION.kind == "silu":
        return x * tl.sigmoid(x)
    elif ACTIVATION.kind == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * _SQRT_HALF))
    elif ACTIVATION.kind == "gelu_tanh":  # (1 + tanh(z)) / 2 = sigmoid(2 z)
        return x * tl.sigmoid((x + 0.044715 * x * x * x) * _TWICE_SQRT_2_PI)
    elif ACTIVATION.kind == "relu":
        return tl.maximum(x, 0.0, propagate_nan=_ALL)
    else:
        tl.static_assert(ACTIVATION.kind == "relu2", "an activation that has no kernel")
        positive = tl.maximum(x, 0.0, propagate_nan=_ALL)
        return positive * positive
