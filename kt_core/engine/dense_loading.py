"""Pack dense layers while they are loaded, as it is done with experts."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from transformers import PreTrainedModel

from kt_core.checkpoint import Checkpoint
from kt_core.dense.packed_linear import PackedLinear
from kt_core.engine import transformers_hook as hook
from kt_core.engine.dense_choice import DenseSite, choose_dense
from kt_core.engine.transformers_tensors import DenseTensor, Sources
from kt_core.errors import (
    CheckpointError,
    UnsupportedDenseError,
    UnsupportedFormatError,
)
from kt_core.interfaces import ExpertDevice, ExpertsSite, LinearKernel
from kt_core.types import ActivationPrecision, Format

_log = logging.getLogger(__name__)

_FLOAT_DTYPES = frozenset({"BF16", "F16", "F32"})


@dataclass(frozen=True, slots=True)
class _Packing:
    """A kernel and what it is loaded from."""

    kernel: LinearKernel
    weight: DenseTensor
    bias: DenseTensor | None

    def load(self) -> None:
        """Read and pack.

        Raises:
            CheckpointError: A number is NaN or infinite.
        """
        bias = None if self.bias is None else self.bias.read()
        try:
            self.kernel.load(self.weight.read(), bias)
        except ValueError as error:
            names = ", ".join(self.weight.names())
            msg = f"{self.weight.parameter}: {error} (from {names})"
            raise CheckpointError(msg) from error


@dataclass(slots=True)
class DenseLoader:
    """Replaces dense layers of one model by packed ones and fills them.

    Attributes:
        device: Who computes them.
        weight_format: What they become.
        precision: What becomes of their inputs.
        layers: The replacements, by the path of the layer; filled by ``replace``.
        packed_bytes: What they take.
    """

    device: ExpertDevice
    weight_format: Format
    precision: ActivationPrecision
    layers: dict[str, PackedLinear] = field(default_factory=dict)
    packed_bytes: int = 0
    _sites: list[DenseSite] = field(default_factory=list)
    _packings: list[_Packing] = field(default_factory=list)

    def choose(self, model: PreTrainedModel, sites: Sequence[ExpertsSite]) -> Collection[str]:
        """Choose the layers; return the parameters whose tensors must be found."""
        self._sites = choose_dense(model, sites, self.device, self.weight_format)
        found = {site.weight for site in self._sites} | {site.bias for site in self._sites}
        return {name for name in found if name is not None}

    def replace(self, model: PreTrainedModel, sources: Sources) -> None:
        """Check what the checkpoint has for the layers, and put packed ones in their place.

        Raises:
            CheckpointError: A tensor is missing, or of another shape than the layer.
            UnsupportedFormatError: A tensor is stored in a way that is not read.
        """
        self._sites = [site for site in self._sites if _is_readable(sources, site)]
        tensors: dict[str, DenseTensor] = {}
        for site in self._sites:
            for parameter in filter(None, (site.weight, site.bias)):
                if parameter not in tensors:
                    tensors[parameter] = DenseTensor(sources, model, parameter)
                    _check(sources.checkpoint, model, tensors[parameter])
        kernels: dict[tuple[str, str | None], LinearKernel] = {}
        for site in self._sites:
            parts = (site.weight, site.bias)
            if parts not in kernels:
                kernels[parts] = self.device.linear_kernel(
                    site.spec, self.weight_format, precision=self.precision
                )
                bias = None if site.bias is None else tensors[site.bias]
                self._packings.append(_Packing(kernels[parts], tensors[site.weight], bias))
            self._swap(model, site, kernels[parts])
        self.packed_bytes = sum(packing.kernel.size_bytes for packing in self._packings)
        hook.forget_dense(
            model,
            [name for site in self._sites for name in site.own_parameters],
            [name for tensor in tensors.values() for name in tensor.names()],
        )

    def tasks(self) -> list[Callable[[], None]]:
        """Return what is to be done to fill the layers, the largest first."""
        ordered = sorted(self._packings, key=lambda packing: -packing.kernel.size_bytes)
        return [partial(packing.load) for packing in ordered]

    def try_out(self, model: PreTrainedModel) -> None:
        """Run the model on three tokens, so that a layer it reads itself shows now.

        Raises:
            UnsupportedDenseError: Nothing sensible comes out, and the model's code asked for the
                weights of packed layers.
        """
        for layer in self.layers.values():
            layer.was_read = False
        reason = _why_not_sensible(model)
        read = [name for name, layer in self.layers.items() if layer.was_read]
        if reason is None:
            return
        if not read:
            _log.warning("the packed dense layers could not be tried out: %s", reason)
            return
        msg = (
            f"{type(model).__name__} reads the weights of {', '.join(read[:3])} itself, so they "
            f"cannot be packed ({reason}). Load it with --dense-format none."
        )
        raise UnsupportedDenseError(msg)

    def _swap(self, model: PreTrainedModel, site: DenseSite, kernel: LinearKernel) -> None:
        replacement = PackedLinear(kernel, site.module.weight.dtype)
        hook.mark_initialised(replacement.weight)
        for name in site.names:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, replacement)
            self.layers[name] = replacement


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


def _why_not_sensible(model: PreTrainedModel) -> str | None:
    """Run two tokens and one more; return None if all numbers are finite."""
    token = model.config.get_text_config(decoder=True).bos_token_id
    first = token if isinstance(token, int) else 0
    step, cache = torch.tensor([[first, first]]), None
    try:
        with torch.inference_mode():
            for _ in range(2):
                output = model(input_ids=step, past_key_values=cache, use_cache=True)
                largest = float(output.logits.float().abs().max())
                if not math.isfinite(largest):
                    return "its logits are not finite"
                step, cache = step[:, :1], output.past_key_values
    except Exception as error:  # noqa: BLE001 - whatever the model's code makes of it
        return f"{type(error).__name__}: {error}"
    return None
