"""A packed dense layer on one device: ``torch.nn.Linear`` for weights of any format."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from kt_core.errors import UnsupportedTrainingError
from kt_core.interfaces.weight_format import QuantizedTensor
from kt_core.types import Format, LinearSpec

if TYPE_CHECKING:
    import torch


class LinearKernel(ABC):
    """One packed matrix and its bias; computes when it is asked to.

    Activations may be bfloat16, float16 or float32 and have any strides and any leading dimensions;
    a result has their type and leading dimensions. Different kernels of a device may be loaded by
    several threads at once; everything else is called from one thread at a time.

    Attributes:
        spec: Shape of the layer.
        weight_format: How the weights are stored.
        trains: Whether ``apply_training`` and ``grad_input`` can be called. As the device's
            ``Capabilities.trains``.
        moves_packed: Whether ``packed``, ``load_packed`` and ``map_packed`` can be called.
    """

    spec: LinearSpec
    weight_format: Format
    trains: bool = False
    moves_packed: bool = False

    @property
    @abstractmethod
    def size_bytes(self) -> int:
        """Bytes of device memory the packed layer takes."""

    @property
    @abstractmethod
    def is_loaded(self) -> bool:
        """Whether there are weights to compute with."""

    @abstractmethod
    def load(
        self, weight: torch.Tensor | QuantizedTensor, bias: torch.Tensor | None = None
    ) -> None:
        """Quantise (where the weights are dense) and pack the layer.

        Loading again replaces it; after an error nothing is loaded. The tensors are not kept.

        Args:
            weight: ``[out_features, in_features]``; a dense tensor may have any strides.
            bias: ``[out_features]``; given if and only if ``spec.has_bias``.

        Raises:
            ValueError: A shape or type does not fit ``spec``, a quantised tensor has another
                format, or a number is NaN or infinite.
        """

    def packed(self) -> torch.Tensor:
        """Return the loaded layer's packed bytes, ``[bytes]`` uint8, on the kernel's device.

        Panels, then the bias, as kt_core/packed/ describes, the same on every device. A view or a
        copy, which must not be written to and is valid until the layer is loaded again.

        Raises:
            ValueError: Nothing is loaded, or ``moves_packed`` is False.
        """
        raise ValueError(self._why_unmoved())

    def load_packed(self, packed: torch.Tensor) -> None:
        """Load the layer from what ``packed`` of another kernel returned: a copy.

        On a device with streams the copy is put into the current stream.

        Raises:
            ValueError: ``packed`` is not ``[bytes]`` uint8 of such a layer, or ``moves_packed`` is
                False.
        """
        del packed
        raise ValueError(self._why_unmoved())

    def map_packed(self, packed: torch.Tensor) -> bool:
        """As ``load_packed``, but use the bytes where they are, if the kernel can.

        Args:
            packed: On the host, at an address that is a multiple of 64. Of a mapped file, for
                instance.

        Returns:
            Whether the kernel keeps ``packed``, which then must not change until the layer is
            loaded again. By default, and on devices with memory of their own, it is copied.

        Raises:
            ValueError: As for ``load_packed``.
        """
        self.load_packed(packed)
        return False

    def _why_unmoved(self) -> str:
        return (
            f"{type(self).__name__} takes no packed bytes, or has none: load the layer's weights "
            "instead"
        )

    @abstractmethod
    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``x W^T + b``, ``[..., out_features]``, when it is computed.

        Args:
            x: ``[..., in_features]``, any number of rows, 0 included.

        Raises:
            ValueError: A shape or type is wrong, or nothing is loaded.
        """

    def apply_training(self, x: torch.Tensor) -> torch.Tensor:
        """Compute what ``grad_input`` differentiates.

        As ``apply``, but may use more precise activations where the precision is the device's own
        choice.

        Raises:
            ValueError: As for ``apply``.
            UnsupportedTrainingError: ``trains`` is False.
        """
        del x
        raise UnsupportedTrainingError(self._why_untrainable())

    def grad_input(self, grad_out: torch.Tensor) -> torch.Tensor:
        """Return the gradient ``grad_out W`` of the input, ``[..., in_features]``.

        The packed weights themselves are frozen. Called from within an operator, where torch's own
        autograd does not record.

        Args:
            grad_out: Gradient of the output, ``[..., out_features]``.

        Raises:
            ValueError: A shape or type is wrong, or nothing is loaded.
            UnsupportedTrainingError: ``trains`` is False.
        """
        del grad_out
        raise UnsupportedTrainingError(self._why_untrainable())

    def _why_untrainable(self) -> str:
        return (
            f"{type(self).__name__} has no gradient for dense layers of "
            f"{self.weight_format.name!r}: use torch.no_grad(), or a device whose capabilities say "
            "that it trains"
        )
