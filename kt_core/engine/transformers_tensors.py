"""Which tensors of a checkpoint a parameter is made of.

That is asked of transformers' own conversion mapping, so there is no naming code here. Private, and
proven as in ``transformers_hook``: ``get_model_conversion_mapping``, ``rename_source_key``,
``WeightConverter.operations``, ``dot_natural_key``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
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

from kt_core.checkpoint import Checkpoint
from kt_core.errors import CheckpointError


class _OneParameterModel:
    """Shows conversion operations the parameter that they make: they only look at its shape."""

    def __init__(self, shape: Sequence[int]) -> None:
        self._empty = torch.empty(tuple(shape), device="meta")

    def get_parameter(self, name: str) -> torch.Tensor:
        """Return an empty tensor of the right shape."""
        del name
        return self._empty


@dataclass(frozen=True, slots=True)
class Sources:
    """Which tensors of a checkpoint parameters are made of.

    Attributes:
        checkpoint: Where the tensors are.
        names: By parameter and source pattern of its converter ("" without one), names of tensors.
        converters: By source pattern.
    """

    checkpoint: Checkpoint
    names: Mapping[str, Mapping[str, list[str]]]
    converters: Mapping[str, WeightConverter]

    def converter_of(self, parameter: str) -> WeightConverter | None:
        """Return a converter of its own for the parameter; None where nothing is converted."""
        patterns = [pattern for pattern in self.names[parameter] if pattern]
        return deepcopy(self.converters[patterns[0]]) if patterns else None


def find_sources(
    checkpoint: Checkpoint, model: PreTrainedModel, parameters: Collection[str]
) -> Sources:
    """Find the checkpoint's tensors of some parameters, in the order of their numbers.

    Args:
        checkpoint: Where the tensors are.
        model: The model on the meta device, before anything in it is replaced.
        parameters: Dotted names.
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
    return Sources(checkpoint, sources, by_pattern)


class DenseTensor:
    """One whole parameter that is made of tensors of its own."""

    def __init__(self, sources: Sources, model: PreTrainedModel, parameter: str) -> None:
        """Take what ``find_sources`` found.

        Raises:
            CheckpointError: Nothing was found, or a part is missing.
        """
        self.parameter = parameter
        self._checkpoint = sources.checkpoint
        self._names = sources.names[parameter]
        self._converter = sources.converter_of(parameter)
        self._model = _OneParameterModel(model.get_parameter(parameter).shape)
        self._config = model.config
        wanted = set(self._converter.source_patterns) if self._converter else {""}
        if set(self._names) != wanted or any(len(names) != 1 for names in self._names.values()):
            msg = (
                f"{parameter} is not in the checkpoint, or not once: it has "
                f"{self.names() or 'nothing for it'}. A shard may be missing from the index, or "
                "config.json belongs to another checkpoint."
            )
            raise CheckpointError(msg)

    @staticmethod
    def is_shared(sources: Sources, parameter: str) -> bool:
        """Whether a converter makes several parameters of what this one is made of."""
        converter = sources.converter_of(parameter)
        return converter is not None and len(converter.target_patterns) > 1

    def names(self) -> list[str]:
        """Names in the checkpoint of the tensors it is made of."""
        return [name for names in self._names.values() for name in names]

    def read(self) -> torch.Tensor:
        """Return the parameter in the checkpoint's type."""
        return self._convert(self._checkpoint.read)

    def shape(self) -> tuple[int, ...]:
        """Return the shape ``read`` would give, from the headers alone.

        Raises:
            CheckpointError: The stored shapes do not even fit together.
        """

        def empty(name: str) -> torch.Tensor:
            return torch.empty(self._checkpoint.tensors[name].shape, device="meta")

        try:
            return tuple(self._convert(empty).shape)
        except RuntimeError as error:
            names = ", ".join(self.names())
            msg = f"the tensors of {self.parameter} ({names}) do not fit together: {error}"
            raise CheckpointError(msg) from error

    def _convert(self, read: Callable[[str], torch.Tensor]) -> torch.Tensor:
        collected = {pattern: [read(name)] for pattern, (name,) in self._names.items()}
        if self._converter is None:
            return collected[""][0]
        targets = self._converter.target_patterns
        return _run(self._converter, collected, targets, self.parameter, self._model, self._config)


def _run(  # noqa: PLR0917 - what transformers' own converters are given
    converter: WeightConverter,
    collected: Any,
    targets: list[str],
    parameter: str,
    model: _OneParameterModel,
    config: Any,
) -> torch.Tensor:
    """Let transformers' own operations make a parameter of lists of tensors."""
    for operation in converter.operations:
        collected = operation.convert(
            collected,
            source_patterns=converter.source_patterns,
            target_patterns=targets,
            full_layer_name=parameter,
            model=model,
            config=config,
            missing_keys=None,
        )
    (value,) = collected.values()
    made: torch.Tensor = value[0] if isinstance(value, list) else value
    return made


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
        self._model = _OneParameterModel((1, *model.get_parameter(parameter).shape[1:]))
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
        return self.convert(expert, self._read_source)

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
            return tuple(self.convert(expert, empty).shape)
        except RuntimeError as error:
            names = ", ".join(self.names(expert))
            msg = f"the tensors of {self.parameter} ({names}) do not fit together: {error}"
            raise CheckpointError(msg) from error

    def _read_source(self, name: str, expert: int) -> torch.Tensor:
        if self._is_fused:
            return self._checkpoint.read_row(name, expert)
        return self._checkpoint.read(name)

    @property
    def is_fused(self) -> bool:
        """Whether one tensor holds the row of every expert."""
        return self._is_fused

    @property
    def layout(self) -> object:
        """What is the same for parameters whose rows are made of their sources alike."""
        return tuple(self._sources), self._is_fused

    def convert(self, expert: int, read: Callable[[str, int], torch.Tensor]) -> torch.Tensor:
        """Make the parameter's row of one expert of tensors from elsewhere.

        Runs transformers' own operations on one expert: stacks and lists of length 1.

        Args:
            expert: Its number.
            read: Given a name of ``names`` and the expert, returns a tensor: with a first
                dimension of 1 where ``is_fused``.
        """
        at = 0 if self._is_fused else expert
        if self._converter is None:
            (names,) = self._sources.values()
            tensor = read(names[at], expert)
            return tensor[0] if self._is_fused else tensor
        collected: Any = {
            pattern: [read(names[at], expert)] for pattern, names in self._sources.items()
        }
        stacked = _run(
            self._converter, collected, self._targets, self.parameter, self._model, self._config
        )
        return stacked[0]


def index_experts(
    sources: Sources, model: PreTrainedModel, parameters: Mapping[str, int]
) -> dict[str, ExpertTensors]:
    """Return the tensors of every expert parameter.

    Args:
        sources: What ``find_sources`` found for these parameters.
        model: The model on the meta device, its experts modules still in place.
        parameters: Experts to find in each parameter, by the parameter's dotted name.

    Raises:
        CheckpointError: Tensors of a parameter are missing.
    """
    return {
        name: ExpertTensors(
            sources.checkpoint,
            model,
            parameter=name,
            num_experts=num_experts,
            sources=sources.names[name],
            converter=sources.converter_of(name),
        )
        for name, num_experts in parameters.items()
    }


def _share(names: list[str], part: int, parts: int) -> list[str]:
    """Return one of several equal parts; everything where it cannot be cut."""
    if parts < 2 or len(names) % parts:
        return names
    size = len(names) // parts
    return names[part * size : (part + 1) * size]
