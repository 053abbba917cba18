"""Stands where a ``torch.nn.Linear`` stood."""

from __future__ import annotations

import torch
from torch import nn

from kt_core.dense.differentiable import number_of, packed_linear
from kt_core.errors import UnsupportedTrainingError
from kt_core.interfaces import LinearKernel


class PackedLinear(nn.Module):
    """A dense layer whose weights are a kernel's; holds no parameters.

    Attributes:
        in_features: As of ``torch.nn.Linear``.
        out_features: As of ``torch.nn.Linear``.
        kernel: Who computes it.
        was_read: Whether somebody asked for ``weight`` or ``bias``.
    """

    def __init__(
        self, kernel: LinearKernel, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        """Take the kernel, and the type and the device that ``weight`` shall say it has."""
        super().__init__()
        self.kernel = kernel
        self.in_features = kernel.spec.in_features
        self.out_features = kernel.spec.out_features
        self.was_read = False
        # One number, seen as a matrix.
        nan = torch.full((1, 1), torch.nan, dtype=dtype, device=device)
        self._weight = nan.expand(self.out_features, self.in_features)
        self._number = number_of(kernel)

    @property
    def weight(self) -> torch.Tensor:
        """A matrix of NaN: its type, shape and device are right, its numbers are nowhere.

        Code that computes with it instead of calling the module gets NaN, which shows when the
        model is loaded.
        """
        self.was_read = True
        return self._weight

    @property
    def bias(self) -> torch.Tensor | None:
        """As ``weight``; None where there is no bias."""
        self.was_read = True
        return self._weight[:, 0] if self.kernel.spec.has_bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``x W^T + b``.

        Args:
            x: ``[..., in_features]``.
        """
        if not self._needs_operator(x):
            return self.kernel.apply(x)
        if not self.kernel.trains:
            msg = (
                f"{type(self.kernel).__name__} has no gradient for dense layers of "
                f"{self.kernel.weight_format.name!r}: use torch.no_grad(), or a device whose "
                "capabilities say that it trains"
            )
            raise UnsupportedTrainingError(msg)
        out: torch.Tensor = packed_linear(x, self._number)
        return out

    def _needs_operator(self, x: torch.Tensor) -> bool:
        """Whether autograd or the compiler needs the operator rather than the kernel.

        In training mode always: gradient checkpointing runs its first pass without gradients, and
        that must compute the same numbers as the second.
        """
        if self.training and self.kernel.trains:
            return True
        if torch.compiler.is_compiling():
            return True
        return x.requires_grad and torch.is_grad_enabled()

    def extra_repr(self) -> str:
        """Describe the layer for ``print(model)``."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.kernel.spec.has_bias}, {self.kernel.weight_format.name} on "
            f"{type(self.kernel).__name__}"
        )
