"""Pack dense layers while they are loaded, as it is done with experts."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial

from transformers import PreTrainedModel

from kt_core.checkpoint import Checkpoint
from kt_core.engine import transformers_hook as hook
from kt_core.engine.dense_choice import DenseSite, choose_dense
from kt_core.engine.dense_layers import DenseLayers
from kt_core.engine.packed_loading import computes_all
from kt_core.engine.transformers_tensors import DenseTensor, Sources
from kt_core.errors import (
    CheckpointError,
    UnsupportedFormatError,
)
from kt_core.interfaces import ExpertDevice, ExpertsSite, LinearKernel
from kt_core.types import ActivationPrecision, Format, LinearSpec

_log = logging.getLogger(__name__)

_FLOAT_DTYPES = frozenset({"BF16", "F16", "F32"})


@dataclass(frozen=True, slots=True)
class _Packing:
    """A kernel and what it is loaded from.

    Attributes:
        kernel: Computes the layer.
        packer: Makes a kernel that packs it on the host; None to let ``kernel`` do that.
        weight: What the checkpoint has.
        bias: As ``weight``; None without one.
    """

    kernel: LinearKernel
    packer: Callable[[], LinearKernel] | None
    weight: DenseTensor
    bias: DenseTensor | None

    def load(self) -> None:
        """Read and pack.

        Raises:
            CheckpointError: A number is NaN or infinite.
        """
        bias = None if self.bias is None else self.bias.read()
        packing = self.packer() if self.packer else self.kernel
        try:
            packing.load(self.weight.read(), bias)
        except ValueError as error:
            names = ", ".join(self.weight.names())
            msg = f"{self.weight.parameter}: {error} (from {names})"
            raise CheckpointError(msg) from error
        if packing is not self.kernel:
            self.kernel.load_packed(packing.packed())


class DenseLoader(DenseLayers):
    """Packs the dense layers of a checkpoint."""

    remedy = "Load it with --dense-format none."

    def __init__(
        self,
        device: ExpertDevice,
        weight_format: Format,
        precision: ActivationPrecision,
        *,
        host: ExpertDevice,
    ) -> None:
        """Take who computes them, what they become, and what becomes of their inputs.

        Args:
            device: Computes them.
            weight_format: What they become.
            precision: What their inputs become.
            host: Packs them, if it can: ``device`` itself, or faster than an accelerator would.
        """
        super().__init__()
        self.device = device
        self.host = host
        self.weight_format = weight_format
        self.precision = precision
        self._sites: list[DenseSite] = []
        self._packings: list[_Packing] = []

    def choose(self, model: PreTrainedModel, sites: Sequence[ExpertsSite]) -> Collection[str]:
        """See ``DenseLayers.choose``."""
        self._sites = choose_dense(model, sites, self.device.linear_bytes, self.weight_format)
        return parameters_of(self._sites)

    def replace(self, model: PreTrainedModel, sources: Sources) -> None:
        """See ``DenseLayers.replace``.

        Raises:
            CheckpointError: A tensor is missing, or of another shape than the layer.
            UnsupportedFormatError: A tensor is stored in a way that is not read.
        """
        self._sites, tensors = dense_tensors(model, sources, self._sites)
        kernels: dict[tuple[str, str | None], LinearKernel] = {}
        for site in self._sites:
            parts = (site.weight, site.bias)
            if parts not in kernels:
                kernels[parts] = self.device.linear_kernel(
                    site.spec, self.weight_format, precision=self.precision
                )
                bias = None if site.bias is None else tensors[site.bias]
                packer = self._packer(site.spec, kernels[parts])
                self._packings.append(_Packing(kernels[parts], packer, tensors[site.weight], bias))
            self.put(model, site.names, site.module, kernels[parts], self.device)
        self.packed_bytes = sum(packing.kernel.size_bytes for packing in self._packings)
        hook.forget_dense(
            model,
            [name for site in self._sites for name in site.own_parameters],
            [name for tensor in tensors.values() for name in tensor.names()],
        )

    def _packer(self, spec: LinearSpec, kernel: LinearKernel) -> Callable[[], LinearKernel] | None:
        if self.host is self.device or not kernel.moves_packed:
            return None
        if not computes_all(self.host.capabilities, [self.weight_format]):
            return None
        packer = partial(self.host.linear_kernel, spec, self.weight_format)
        return packer if packer().moves_packed else None

    def tasks(self) -> list[Callable[[], None]]:
        """See ``DenseLayers.tasks``."""
        ordered = sorted(self._packings, key=lambda packing: -packing.kernel.size_bytes)
        return [partial(packing.load) for packing in ordered]


def parameters_of(sites: Sequence[DenseSite]) -> set[str]:
    """Return the parameters whose tensors the layers are made of."""
    found = {site.weight for site in sites} | {site.bias for site in sites}
    return {name for name in found if name is not None}


def dense_tensors(
    model: PreTrainedModel, sources: Sources, sites: Sequence[DenseSite]
) -> tuple[list[DenseSite], dict[str, DenseTensor]]:
    """Return the layers that have tensors of their own, and the tensors of each parameter.

    Raises:
        CheckpointError: A tensor is missing, or of another shape than the layer.
        UnsupportedFormatError: A tensor is stored in a way that is not read.
    """
    readable = [site for site in sites if _is_readable(sources, site)]
    tensors: dict[str, DenseTensor] = {}
    for parameter in sorted(parameters_of(readable)):
        tensors[parameter] = DenseTensor(sources, model, parameter)
        _check(sources.checkpoint, model, tensors[parameter])
    return readable, tensors


def _is_readable(sources: Sources, site: DenseSite) -> bool:
    """Whether a layer has tensors of its own.

    A converter that makes several parameters of one tensor does so for all of them or for none;
    and the tensor of a tied weight must be there under the owner's name.
    """
    parts = [part for part in (site.weight, site.bias) if part is not None]
    if any(DenseTensor.is_shared(sources, part) for part in parts):
        return False
    is_tied = site.weight not in site.own_parameters
    return bool(sources.names[site.weight]) or not is_tied


def _check(checkpoint: Checkpoint, model: PreTrainedModel, tensor: DenseTensor) -> None:
    """Check type and shape from the headers."""
    for name in tensor.names():
        dtype = checkpoint.tensors[name].dtype
        if dtype not in _FLOAT_DTYPES:
            msg = f"{name} is stored as {dtype}; this version packs BF16, F16 and F32 layers"
            raise UnsupportedFormatError(msg)
    wanted = tuple(model.get_parameter(tensor.parameter).shape)
    if tensor.shape() != wanted:
        msg = (
            f"{tensor.parameter} is {list(tensor.shape())} on disk ({', '.join(tensor.names())}), "
            f"config.json asks for {list(wanted)}. They belong to different models."
        )
        raise CheckpointError(msg)
