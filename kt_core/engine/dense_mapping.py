"""Dense layers of a packed model directory: mapped, and used where they lie."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from transformers import PreTrainedModel

from kt_core.checkpoint import PackedDirectory
from kt_core.checkpoint.packed_config import PackedDense
from kt_core.engine import transformers_hook as hook
from kt_core.engine.dense_layers import DenseLayers
from kt_core.engine.transformers_tensors import Sources
from kt_core.errors import CheckpointError
from kt_core.interfaces import ExpertDevice, ExpertsSite, LinearKernel
from kt_core.packed.codec import unpack_linear
from kt_core.types import ActivationPrecision, LinearSpec


@dataclass(frozen=True, slots=True)
class _Mapping:
    """A kernel and the bytes that it gets."""

    kernel: LinearKernel
    packed: torch.Tensor

    def load(self) -> None:
        """Let the kernel use the bytes where they are, or copy them, or give it the numbers."""
        kernel = self.kernel
        if kernel.moves_packed:
            kernel.map_packed(self.packed)
        else:
            kernel.load(*unpack_linear(self.packed, kernel.spec, kernel.weight_format))


class DirectoryDense(DenseLayers):
    """The packed dense layers of a packed model directory."""

    remedy = "Make it again with `kt quant`, without --dense-format."

    def __init__(self, packed: PackedDirectory) -> None:
        """Take where they are."""
        super().__init__()
        self.packed = packed

    def choose(self, model: PreTrainedModel, sites: Sequence[ExpertsSite]) -> Collection[str]:
        """See ``DenseLayers.choose``. The directory says which; no tensors are needed."""
        del model, sites
        return ()

    def replace(self, model: PreTrainedModel, sources: Sources) -> None:
        """See ``DenseLayers.replace``.

        Raises:
            CheckpointError: A layer is missing from the model or of another shape, or the files
                are not what config.json says.
            UnsupportedFormatError: The device does not compute its format.
        """
        places: dict[int, list[str]] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            places.setdefault(id(module), []).append(name)
        gone = []
        for layer in self.packed.config.dense.values():
            module = _linear(model, layer, self.packed)
            names = places[id(module)]
            leaves = [leaf for leaf, _ in module.named_parameters()]
            gone += [f"{name}.{leaf}" for name in names for leaf in leaves]
            packed = self.packed.dense(layer.name, sources.checkpoint)
            self.take(model, names, module, layer, packed)
        tensors = [layer.packed_name for layer in self.packed.config.dense.values()]
        hook.forget_dense(model, gone, tensors)

    @abstractmethod
    def take(
        self,
        model: PreTrainedModel,
        names: Sequence[str],
        module: nn.Linear,
        layer: PackedDense,
        packed: torch.Tensor,
    ) -> None:
        """Take the parameters out of one layer, and remember what it is filled from.

        Args:
            model: The model.
            names: Dotted paths of the layer.
            module: The layer.
            layer: How it is packed.
            packed: ``[bytes]`` uint8, mapped: never to be written to.
        """


class MappedDense(DirectoryDense):
    """Packed dense layers that a kernel computes, where they are or from a copy on its device."""

    def __init__(
        self, device: ExpertDevice, packed: PackedDirectory, precision: ActivationPrecision
    ) -> None:
        """Take who computes them, where they are, and what becomes of their inputs."""
        super().__init__(packed)
        self.device = device
        self.precision = precision
        self._mappings: list[_Mapping] = []

    def take(
        self,
        model: PreTrainedModel,
        names: Sequence[str],
        module: nn.Linear,
        layer: PackedDense,
        packed: torch.Tensor,
    ) -> None:
        """See ``DirectoryDense.take``."""
        kernel = self.device.linear_kernel(
            layer.spec, layer.weight_format, precision=self.precision
        )
        self._mappings.append(_Mapping(kernel, packed))
        self.put(model, names, module, kernel, self.device)
        self.packed_bytes += kernel.size_bytes

    def tasks(self) -> list[Callable[[], None]]:
        """See ``DenseLayers.tasks``."""
        ordered = sorted(self._mappings, key=lambda mapping: -mapping.kernel.size_bytes)
        return [partial(mapping.load) for mapping in ordered]


def _linear(model: PreTrainedModel, layer: PackedDense, packed: PackedDirectory) -> nn.Linear:
    try:
        module = model.get_submodule(layer.name)
    except AttributeError:
        module = None
    found = None
    if type(module) is nn.Linear:
        has_bias = module.bias is not None
        found = LinearSpec(
            in_features=module.in_features, out_features=module.out_features, has_bias=has_bias
        )
        if found == layer.spec:
            return module
    msg = (
        f"the files in {packed.directory} hold a packed dense layer {layer.name} of {layer.spec}, "
        f"the model of its config.json has {found or 'none there'}. config.json was changed; copy "
        "it again, or make it again with `kt quant`."
    )
    raise CheckpointError(msg)
