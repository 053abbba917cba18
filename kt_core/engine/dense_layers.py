"""Dense layers of one model that transformers does not load: what takes their place."""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from typing import ClassVar

import torch
from torch import nn
from transformers import PreTrainedModel

from kt_core.dense.packed_linear import PackedLinear
from kt_core.engine import transformers_hook as hook
from kt_core.engine.transformers_tensors import Sources
from kt_core.errors import UnsupportedDenseError
from kt_core.interfaces import ExpertDevice, ExpertsSite, LinearKernel
from kt_core.types import Format

_log = logging.getLogger(__name__)


class DenseLayers(ABC):
    """Takes dense layers of one model from transformers, most to put packed ones there; fills them.

    Attributes:
        layers: The packed ones, by the path of the layer; filled by ``replace``.
        packed_bytes: What these take.
        remedy: What to do where the model cannot do with packed ones.
        stage: What is being done while they are filled.
    """

    remedy: ClassVar[str]
    stage: ClassVar[str] = "packed dense layers"

    def __init__(self) -> None:
        """Start with none."""
        self.layers: dict[str, PackedLinear] = {}
        self.packed_bytes = 0

    @abstractmethod
    def choose(self, model: PreTrainedModel, sites: Sequence[ExpertsSite]) -> Collection[str]:
        """Choose the layers; return the parameters whose tensors must be found."""

    @abstractmethod
    def replace(self, model: PreTrainedModel, sources: Sources) -> None:
        """Check what there is for the layers, and take their parameters out of the model.

        Raises:
            KtError: There is something else.
        """

    @abstractmethod
    def tasks(self) -> list[Callable[[], None]]:
        """Return what is to be done to fill the layers, the largest first."""

    @property
    def formats(self) -> set[Format]:
        """Return the formats that the layers have."""
        return {layer.kernel.weight_format for layer in self.layers.values()}

    def try_out(self, model: PreTrainedModel) -> None:
        """Run the model on three tokens, so that a layer it reads itself shows now.

        Raises:
            UnsupportedDenseError: Nothing sensible comes out, and the model's code asked for the
                weights of packed layers.
        """
        if not self.layers:
            return
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
            f"cannot be packed ({reason}). {self.remedy}"
        )
        raise UnsupportedDenseError(msg)

    def put(
        self,
        model: PreTrainedModel,
        names: Sequence[str],
        replaced: nn.Linear,
        kernel: LinearKernel,
        device: ExpertDevice,
    ) -> None:
        """Put a packed layer in the place of another, wherever that stands.

        Args:
            model: The model.
            names: Dotted paths of the layer.
            replaced: What stands there.
            kernel: Computes it.
            device: Whose kernel it is.
        """
        replacement = PackedLinear(kernel, replaced.weight.dtype, device.info.torch_device)
        hook.mark_initialised(replacement.weight)
        for name in names:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, replacement)
            self.layers[name] = replacement


def _why_not_sensible(model: PreTrainedModel) -> str | None:
    """Run two tokens and one more; return None if all numbers are finite."""
    token = model.config.get_text_config(decoder=True).bos_token_id
    first = token if isinstance(token, int) else 0
    step, cache = torch.tensor([[first, first]], device=model.device), None
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
