"""What activations become on a device whose matrix units take bfloat16."""

from __future__ import annotations

import torch

from kt_core.types import ActivationPrecision


def named_precision(asked_for: ActivationPrecision, dtype: torch.dtype) -> ActivationPrecision:
    """Return what ``AUTO`` stands for: bfloat16 stays what it is, others lose nothing."""
    if asked_for is not ActivationPrecision.AUTO:
        return asked_for
    is_bf16 = dtype is torch.bfloat16
    return ActivationPrecision.BF16 if is_bf16 else ActivationPrecision.FLOAT32
