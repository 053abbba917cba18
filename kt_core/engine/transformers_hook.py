"""What depends on how transformers loads a model: the file to mend when that changes.

transformers lets a *quantizer* prepare the model, still on the meta device, before weights are
read. Ours takes the routed experts out of it: each experts module is replaced by HybridExperts, its
parameters leave the module tree, so transformers never reads their tensors. The same goes for dense
layers that are packed; the rest it loads as ever. What their tensors are called on disk is the
business of ``transformers_tensors``.

What only we can read reaches it as a state dict of tensors that are read when they are asked for:
tests/checkpoints proves that.

Public: ``register_quantizer``, ``register_quantization_config``, ``HfQuantizer``. Private, and
proven by tests/engine/test_loading_hook.py on the versions that pyproject.toml allows:
``str_to_torch_dtype``, ``all_tied_weights_keys``, ``_keys_to_ignore_on_load_unexpected``,
``_keep_in_fp32_modules``.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.modeling_utils import str_to_torch_dtype
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from kt_core.checkpoint import Checkpoint
from kt_core.errors import CheckpointError

_log = logging.getLogger(__name__)

METHOD = "kt"


@register_quantization_config(METHOD)
class KtLoadingConfig(QuantizationConfigMixin):
    """Carries our loader into ``from_pretrained``; nothing of it is ever saved."""

    def __init__(
        self, prepare: Callable[[PreTrainedModel], None] | None = None, **stored: Any
    ) -> None:
        """Take the function that replaces modules; ``stored`` is what a packed model says."""
        del stored
        self.quant_method = METHOD  # type: ignore[assignment]  # an enumeration of theirs
        self.prepare = prepare

    def __deepcopy__(self, memo: dict[int, Any]) -> KtLoadingConfig:
        """Copy without the loader: transformers copies configs, and it holds threads and files."""
        del memo
        return KtLoadingConfig()

    def to_dict(self) -> dict[str, Any]:
        """Return what may appear in a config.json."""
        return {"quant_method": METHOD}


@register_quantizer(METHOD)
class KtQuantizer(HfQuantizer):
    """Lets ``KtLoadingConfig.prepare`` work on the model before its weights are read."""

    requires_calibration = False

    def __init__(self, quantization_config: KtLoadingConfig, **kwargs: Any) -> None:
        """Claim that the checkpoint is quantised: otherwise transformers loads with one thread."""
        super().__init__(quantization_config, **{**kwargs, "pre_quantized": True})

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, **kwargs: Any
    ) -> PreTrainedModel:
        del kwargs
        config = self.quantization_config
        assert isinstance(config, KtLoadingConfig)
        if config.prepare is None:
            msg = (
                f"the experts of {model.config.name_or_path} are packed by kt, which transformers "
                "cannot read alone: load it with `kt_core.load`, or run it with `kt run`"
            )
            raise CheckpointError(msg)
        config.prepare(model)
        return model

    def is_serializable(self) -> bool:
        """Refuse ``save_pretrained``: the experts are not in the module tree."""
        _log.warning("the experts are packed by kt, not part of this model; save the original")
        return False

    @property
    def is_trainable(self) -> bool:
        """Gradients pass through packed experts; what is trained stands beside them."""
        return True


class _LazyTensor:
    """Looks like a slice of a safetensors file: reads when it is indexed with ``[...]``."""

    def __init__(self, checkpoint: Checkpoint, name: str) -> None:
        self._checkpoint = checkpoint
        self._name = name
        self.shape = checkpoint.tensors[name].shape
        self.dtype = str_to_torch_dtype[checkpoint.tensors[name].dtype]

    def __getitem__(self, index: Any) -> torch.Tensor:
        value: torch.Tensor = self._checkpoint.read(self._name)[index]
        return value

    def is_floating_point(self) -> bool:
        return self.dtype.is_floating_point

    def get_shape(self) -> list[int]:
        return list(self.shape)


def lazy_state(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return all tensors for ``from_pretrained(None, state_dict=...)``; none is read yet."""
    return {name: _LazyTensor(checkpoint, name) for name in checkpoint.tensors}


def generation_config(directory: Path) -> GenerationConfig | None:
    """Return what the model directory says about generation, where it says something."""
    if not (directory / "generation_config.json").is_file():
        return None
    return GenerationConfig.from_pretrained(directory)


def forget_experts(model: PreTrainedModel, modules: Sequence[str], prefixes: Sequence[str]) -> None:
    """Tell transformers that the experts' parameters are gone on purpose.

    Args:
        model: The model, its experts modules replaced.
        modules: Dotted paths of the replaced modules.
        prefixes: Dotted paths below which the experts' parameters were.
    """
    # Not unexpected in the checkpoint; where a converter names them, the report shows the name
    # before conversion.
    patterns = {re.escape(prefix) + r"\." for prefix in prefixes}
    ignored = set(model._keys_to_ignore_on_load_unexpected or ())
    model._keys_to_ignore_on_load_unexpected = {*ignored, *patterns, r"experts\."}
    # Not to be tied: we share the kernel instead.
    below = tuple(f"{prefix}." for prefix in prefixes)
    for name in [n for n in model.all_tied_weights_keys or {} if n.startswith(below)]:
        del model.all_tied_weights_keys[name]
    # Not to be initialised: some blocks reach into their experts for that.
    for module in modules:
        parent: Any = model.get_submodule(module.rpartition(".")[0])
        parent._is_hf_initialized = True


def forget_dense(
    model: PreTrainedModel, parameters: Collection[str], names: Collection[str]
) -> None:
    """Tell transformers that parameters of dense layers are gone on purpose.

    Args:
        model: The model, its layers replaced.
        parameters: Dotted names of the parameters.
        names: Names in the checkpoint of the tensors they are made of.
    """
    # Layers differ in their number only: one pattern for all, since every key is matched with all.
    patterns = {
        "^" + re.sub(r"\d+", r"\\d+", re.escape(name)) + "$" for name in (*parameters, *names)
    }
    ignored = set(model._keys_to_ignore_on_load_unexpected or ())
    model._keys_to_ignore_on_load_unexpected = {*ignored, *patterns}
    for name in set(parameters) & set(model.all_tied_weights_keys or {}):
        del model.all_tied_weights_keys[name]
    # Nor later, when somebody calls tie_weights(): each model within the model has its own list.
    for prefix, part in model.named_modules():
        if isinstance(part, PreTrainedModel) and isinstance(part._tied_weights_keys, dict):
            start = f"{prefix}." if prefix else ""
            kept = {t: s for t, s in part._tied_weights_keys.items() if start + t not in parameters}
            part._tied_weights_keys = kept


def mark_initialised(parameter: torch.Tensor) -> None:
    """Keep transformers from drawing random numbers for it."""
    parameter._is_hf_initialized = True  # type: ignore[attr-defined]  # an attribute of theirs


def kept_precise(model: PreTrainedModel, parameter: str) -> bool:
    """Whether transformers keeps the parameter in float32 where others become float16 or bf16."""
    names = {*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())}
    return any(re.search(name, parameter) for name in names)


def tied_source(model: PreTrainedModel, parameter: str) -> str:
    """Return the parameter whose tensor this one shares, or itself."""
    return str((model.all_tied_weights_keys or {}).get(parameter, parameter))
