"""Everything that depends on how transformers loads a model: the one file to mend when it changes.

transformers lets a *quantizer* prepare the model, still on the meta device, before weights are
read. Ours takes the routed experts out of it: each experts module is replaced by HybridExperts, its
parameters leave the module tree, so transformers never reads their tensors; the dense part it loads
as ever. Which tensor of the checkpoint belongs to which parameter is asked of transformers' own
conversion mapping, so there is no naming code here.

Public: ``register_quantizer``, ``register_quantization_config``, ``HfQuantizer``. Private, and
proven by tests/engine/test_loading_hook.py on the versions that pyproject.toml allows:
``get_model_conversion_mapping``, ``rename_source_key``, ``WeightConverter.operations``,
``dot_natural_key``, ``all_tied_weights_keys``, ``_keys_to_ignore_on_load_unexpected``.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)
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

    def __init__(self, prepare: Callable[[PreTrainedModel], None] | None = None) -> None:
        """Take the function that replaces the experts modules."""
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
        assert config.prepare is not None
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


def tied_source(model: PreTrainedModel, parameter: str) -> str:
    """Return the parameter whose tensor this one shares, or itself."""
    return str((model.all_tied_weights_keys or {}).get(parameter, parameter))


class _OneExpertModel:
    """Shows conversion operations the model's parameters as they are with a single expert."""

    def __init__(self, parameter: torch.Tensor) -> None:
        self._empty = torch.empty((1, *parameter.shape[1:]), device="meta")

    def get_parameter(self, name: str) -> torch.Tensor:
        """Return an empty tensor of the right shape; operations only look at that."""
        del name
        return self._empty


class ExpertTensors:
    """One expert parameter ``[experts, ...]``, read from the checkpoint one expert at a time."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        model: PreTrainedModel,
        *,
        parameter: str,
        num_experts: int,
        sources: Mapping[str, list[str]],
        converter: WeightConverter | None,
    ) -> None:
        """Take the checkpoint's tensor names by source pattern of the converter.

        A converter with several targets, one of which is ``parameter``, shares the names out
        evenly: the first target has the first experts.

        Raises:
            CheckpointError: The names do not cover every expert, or are stored in a way that
                cannot be read expert by expert.
        """
        self.parameter = parameter
        self._checkpoint = checkpoint
        self._model = _OneExpertModel(model.get_parameter(parameter))
        self._config = model.config
        self._converter = converter
        targets = list(converter.target_patterns) if converter else []
        at = next((i for i, target in enumerate(targets) if target in parameter), 0)
        self._targets = targets[at : at + 1]
        self._sources = {
            pattern: _share(names, at, len(targets)) for pattern, names in sources.items()
        }
        counts = {len(names) for names in self._sources.values()}
        missing = set(converter.source_patterns) - set(sources) if converter else set()
        self._is_fused = counts == {1} and not (num_experts == 1 and converter is not None)
        found = {pattern: len(names) for pattern, names in self._sources.items()}
        if self._is_fused:
            found = {name: (*checkpoint.tensors[name].shape, 0)[0] for name in self.names(0)}
        if missing or set(found.values()) != {num_experts}:
            msg = (
                f"{parameter} needs {num_experts} experts, the checkpoint has {found or 'none'}"
                f"{f', and nothing for {sorted(missing)}' if missing else ''}. A shard may be "
                "missing, or config.json belongs to another checkpoint."
            )
            raise CheckpointError(msg)

    def names(self, expert: int) -> list[str]:
        """Names in the checkpoint of the tensors that hold one expert."""
        at = 0 if self._is_fused else expert
        return [names[at] for names in self._sources.values()]

    def read(self, expert: int) -> torch.Tensor:
        """Return the parameter's row of one expert, in the checkpoint's type."""
        return self._convert(expert, self._read_source)

    def shape(self, expert: int) -> tuple[int, ...]:
        """Return the shape ``read`` would give, from the headers alone.

        Raises:
            CheckpointError: The stored shapes do not even fit together.
        """

        def empty(name: str, expert: int) -> torch.Tensor:
            del expert
            shape = self._checkpoint.tensors[name].shape
            return torch.empty((1, *shape[1:]) if self._is_fused else shape, device="meta")

        try:
            return tuple(self._convert(expert, empty).shape)
        except RuntimeError as error:
            names = ", ".join(self.names(expert))
            msg = f"the tensors of {self.parameter} ({names}) do not fit together: {error}"
            raise CheckpointError(msg) from error

    def _read_source(self, name: str, expert: int) -> torch.Tensor:
        if self._is_fused:
            return self._checkpoint.read_row(name, expert)
        return self._checkpoint.read(name)

    def _convert(self, expert: int, read: Callable[[str, int], torch.Tensor]) -> torch.Tensor:
        """Run transformers' own operations on one expert: stacks and lists of length 1."""
        at = 0 if self._is_fused else expert
        if self._converter is None:
            (names,) = self._sources.values()
            tensor = read(names[at], expert)
            return tensor[0] if self._is_fused else tensor
        collected: Any = {
            pattern: [read(names[at], expert)] for pattern, names in self._sources.items()
        }
        for operation in self._converter.operations:
            collected = operation.convert(
                collected,
                source_patterns=self._converter.source_patterns,
                target_patterns=self._targets,
                full_layer_name=self.parameter,
                model=self._model,
                config=self._config,
                missing_keys=None,
            )
        (value,) = collected.values()
        stacked: torch.Tensor = value[0] if isinstance(value, list) else value
        return stacked[0]


def index_experts(
    checkpoint: Checkpoint, model: PreTrainedModel, parameters: Mapping[str, int]
) -> dict[str, ExpertTensors]:
    """Find the checkpoint's tensors of every expert parameter.

    Args:
        checkpoint: Where the tensors are.
        model: The model on the meta device, its experts modules still in place.
        parameters: Experts to find in each parameter, by the parameter's dotted name.

    Raises:
        CheckpointError: Tensors of a parameter are missing.
    """
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    state = model.state_dict()
    sources: dict[str, dict[str, list[str]]] = {name: {} for name in parameters}
    for key in sorted(checkpoint.tensors, key=dot_natural_key):
        renamed, pattern = rename_source_key(
            key, renamings, converters, model.base_model_prefix, state
        )
        if renamed not in state and key in state:
            renamed, pattern = key, None
        targets = by_pattern[pattern].target_patterns if pattern else [renamed]
        for name in (renamed.replace(targets[0], target) for target in targets):
            if name in sources:
                sources[name].setdefault(pattern or "", []).append(key)
    tensors = {}
    for name, num_experts in parameters.items():
        patterns = [pattern for pattern in sources[name] if pattern]
        converter = deepcopy(by_pattern[patterns[0]]) if patterns else None
        tensors[name] = ExpertTensors(
            checkpoint,
            model,
            parameter=name,
            num_experts=num_experts,
            sources=sources[name],
            converter=converter,
        )
    return tensors


def _share(names: list[str], part: int, parts: int) -> list[str]:
    """Return one of several equal parts; everything where it cannot be cut."""
    if parts < 2 or len(names) % parts:
        return names
    size = len(names) // parts
    return names[part * size : (part + 1) * size]
