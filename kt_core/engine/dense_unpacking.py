"""Packed dense layers where torch computes dense layers: unpacked, and plain from then on.

On the host, panel by panel, straight from the mapped file into the accelerator's memory: what a
thread holds meanwhile is a piece of one layer.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from transformers import PreTrainedModel

from kt_core.checkpoint import PackedDirectory
from kt_core.checkpoint.packed_config import PackedDense
from kt_core.engine import transformers_hook as hook
from kt_core.engine.dense_mapping import DirectoryDense
from kt_core.engine.expert_formats import formats_name
from kt_core.engine.transformers_tensors import Sources
from kt_core.packed import LinearLayout
from kt_core.packed.codec import unpack_bias, unpack_matrix
from kt_core.packed.layout import PANEL, MatrixLayout
from kt_core.quant.reference import dequantize

_log = logging.getLogger(__name__)

# Weights that a thread unpacks at once: some 20 MB with what lies between, and so much work that
# threads seldom wait for Python.
_PIECE_WEIGHTS = 1 << 20


@dataclass(frozen=True, slots=True)
class _Unpacking:
    """A layer without parameters, and the bytes that they are in.

    Attributes:
        module: The layer.
        packed: ``[bytes]`` uint8, mapped.
        layer: How it is packed.
        dtype: What the numbers are rounded to.
    """

    module: nn.Linear
    packed: torch.Tensor
    layer: PackedDense
    dtype: torch.dtype

    @property
    def unpacked_bytes(self) -> int:
        """What weight and bias take."""
        spec = self.layer.spec
        numbers = spec.out_features * (spec.in_features + spec.has_bias)
        return numbers * self.dtype.itemsize

    def pieces(self, device: torch.device) -> Iterator[Callable[[], None]]:
        """Give the layer memory on the device, and yield what fills it."""
        spec, weight_format = self.layer.spec, self.layer.weight_format
        layout = LinearLayout.of(spec, weight_format)
        shape = (spec.out_features, spec.in_features)
        weight = torch.empty(shape, dtype=self.dtype, device=device)
        self.module.weight = nn.Parameter(weight, requires_grad=False)
        if (bias := unpack_bias(self.packed, layout)) is not None:
            bias = bias.to(self.dtype).to(device)
            self.module.bias = nn.Parameter(bias, requires_grad=False)
        panels = self.packed[: layout.bias_offset].view(layout.weight.panels, -1)
        step = max(1, _PIECE_WEIGHTS // (PANEL * spec.in_features))
        for first in range(0, len(panels), step):
            rows = weight[first * PANEL : (first + step) * PANEL]
            piece = MatrixLayout.of(weight_format, *rows.shape)
            yield partial(_unpack, panels[first : first + step], piece, rows)


def _unpack(panels: torch.Tensor, layout: MatrixLayout, target: torch.Tensor) -> None:
    """Fill ``target``, ``[outputs, inputs]``, from ``[panels, panel_bytes]`` uint8."""
    target.copy_(dequantize(unpack_matrix(panels, layout)).to(target.dtype))


class UnpackedDense(DirectoryDense):
    """Packed dense layers that become ``torch.nn.Linear`` on an accelerator, as they were.

    ``layers`` stays empty and ``packed_bytes`` 0: nothing is packed once it is loaded.
    """

    stage = "unpacking dense layers"

    def __init__(self, packed: PackedDirectory, device: torch.device, name: str) -> None:
        """Take where they are, where they go, and what users call that."""
        super().__init__(packed)
        self.device = device
        self.name = name
        self._unpackings: list[_Unpacking] = []

    def replace(self, model: PreTrainedModel, sources: Sources) -> None:
        """See ``DirectoryDense.replace``. Tells the user what it costs."""
        super().replace(model, sources)
        layers = self.packed.config.dense.values()
        _log.warning(
            "dense layers of this model are packed as %s, and %s leaves dense layers to torch: "
            "unpacked they take %.2f GB there, packed they would be %.2f GB",
            formats_name(layer.weight_format for layer in layers),
            self.name,
            sum(unpacking.unpacked_bytes for unpacking in self._unpackings) / 1e9,
            sum(layer.size_bytes for layer in layers) / 1e9,
        )

    def take(
        self,
        model: PreTrainedModel,
        names: Sequence[str],
        module: nn.Linear,
        layer: PackedDense,
        packed: torch.Tensor,
    ) -> None:
        """See ``DirectoryDense.take``."""
        del model, names
        self._unpackings.append(_Unpacking(module, packed, layer, module.weight.dtype))
        for leaf, parameter in list(module.named_parameters()):
            delattr(module, leaf)
            # Something of its shape and type, which is no parameter: nothing to load, or to draw.
            setattr(module, leaf, parameter.detach())
            hook.mark_initialised(getattr(module, leaf))

    def tasks(self) -> list[Callable[[], None]]:
        """See ``DenseLayers.tasks``. Takes the memory at once."""
        tasks: list[Callable[[], None]] = []
        for unpacking in self._unpackings:
            tasks += unpacking.pieces(self.device)
        self._unpackings.clear()
        self.packed.release_dense()
        return tasks
