"""How a kind of quantised checkpoint stores its matrices: what a reader tells the loader."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from kt_core.interfaces.weight_format import QuantizedTensor
from kt_core.types import Format

if TYPE_CHECKING:
    import torch

Decode: TypeAlias = "Callable[[Mapping[str, torch.Tensor]], QuantizedTensor | torch.Tensor]"
ReadTensor: TypeAlias = "Callable[[str], torch.Tensor]"


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """Where one tensor is.

    Attributes:
        file: The file that holds it.
        dtype: The word of safetensors: ``BF16``, ``F32``, ``F8_E4M3`` ...
        shape: Its dimensions.
        size_bytes: Bytes it takes in the file.
        offset: Where in the file they begin.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    size_bytes: int
    offset: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredMatrix:
    """A matrix that is made of tensors with other names, or a stack of such matrices.

    Attributes:
        name: What the tensor would be called if the checkpoint were not quantised.
        shape: Its shape then: ``[out, in]``, with ``[experts, ...]`` before it for a stack.
        parts: Names of the tensors it is made of, by what ``decode`` calls them.
        decode: Makes one matrix ``[out, in]`` of its parts: a tensor of ``weight_format``, or,
            where that is None, floating-point numbers of any type. Raises ``ValueError`` for parts
            that do not fit.
        weight_format: The format that holds every number exactly; None where there is none.
        nearest: What it is quantised into instead where it is asked to stay as it is.
        row: Which row of the parts it is; None for all of them.
        is_transposed: ``shape`` is ``[in, out]``, though ``decode`` gives ``[out, in]``.
        unread: Further tensors that belong to it and are not needed, such as scales of activations.
    """

    name: str
    shape: tuple[int, ...]
    parts: Mapping[str, str]
    decode: Decode
    weight_format: Format | None
    nearest: Format | None = None
    row: int | None = None
    is_transposed: bool = False
    unread: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if (self.weight_format is None) == (self.nearest is None):
            msg = f"{self.name}: give either weight_format or nearest"
            raise ValueError(msg)

    @property
    def is_stack(self) -> bool:
        """Whether the first dimension counts matrices."""
        return len(self.shape) > 2

    @property
    def packed_format(self) -> Format:
        """What it becomes where nobody asks for something else."""
        packed = self.weight_format or self.nearest
        assert packed is not None
        return packed


class CheckpointFormat(ABC):
    """A way of storing quantised weights in a checkpoint.

    Attributes:
        name: The ``quant_method`` in config.json that it is for.
        aliases: Further ones.
    """

    name: str
    aliases: tuple[str, ...] = ()

    @abstractmethod
    def matrices(
        self, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo], read: ReadTensor
    ) -> Iterable[StoredMatrix]:
        """Yield the quantised matrices among the tensors of a checkpoint.

        A tensor that is a part of none is loaded as it is.

        Args:
            config: ``quantization_config`` of config.json.
            tensors: What the headers say, by name.
            read: Returns a whole tensor. For small ones, and only where the headers do not tell:
                a large checkpoint has some hundred thousand.

        Raises:
            CheckpointError: A part is missing, or of a type or shape that cannot be.
            UnsupportedFormatError: This is stored in a way that is not read.
        """
