"""A routing trace: which experts every token was sent to, step by step; and its file.

The file is safetensors. Tensors:

=================  ===================  =========================================================
``expert_ids``     uint16 [T, L, K]     experts of each token in each layer; 65535: none
``weights``        float16 [T, L, K]    routing weights, in the order of the ids (may be absent)
``predicted_ids``  uint16 [T, L, K]     what the layer before foretold (may be absent)
``step_tokens``    int64 [S]            tokens of each forward pass, in order; they add up to T
``step_is_decode`` uint8 [S]            1 where the pass continued an answer, 0 for a prefill
``prompt_steps``   int64 [P]            the first step of each prompt, ascending from 0
=================  ===================  =========================================================

The header holds the metadata ``format`` (``kt-routing-trace``), ``version`` (``1``), and, as JSON,
``num_experts``, ``expert_bytes`` and ``expert_weights`` (lists with a value for each layer),
``dense_bytes`` and ``model``. A reader refuses another version; metadata it does not know are no
error.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from kt_core.errors import TraceError
from kt_core.interfaces import ExpertGrid, RoutingStatistics
from kt_core.paths import replacing

FORMAT, VERSION = "kt-routing-trace", "1"
NO_EXPERT = 0xFFFF

Ids = npt.NDArray[np.uint16]
_DTYPES = {
    "expert_ids": np.uint16,
    "weights": np.float16,
    "predicted_ids": np.uint16,
    "step_tokens": np.int64,
    "step_is_decode": np.uint8,
    "prompt_steps": np.int64,
}
_OPTIONAL = {"weights", "predicted_ids"}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RoutingTrace:
    """Routing of some prompts and their answers. Arrays are as in the file: see the module.

    Attributes:
        model: What was traced, in words.
        grid: Layers and experts, with the bytes of the packed format that ran.
        expert_weights: Weight elements of one expert, for each layer.
        dense_bytes: Bytes of everything but the experts.
        expert_ids: ``[tokens, layers, top_k]``.
        step_tokens: ``[steps]``.
        step_is_decode: ``[steps]``.
        prompt_steps: ``[prompts]``.
        weights: ``[tokens, layers, top_k]``, or None.
        predicted_ids: ``[tokens, layers, top_k]``, or None.
    """

    model: str
    grid: ExpertGrid
    expert_weights: tuple[int, ...]
    dense_bytes: int
    expert_ids: Ids
    step_tokens: npt.NDArray[np.int64]
    step_is_decode: npt.NDArray[np.uint8]
    prompt_steps: npt.NDArray[np.int64]
    weights: npt.NDArray[np.float16] | None = None
    predicted_ids: Ids | None = None

    def __post_init__(self) -> None:
        for problem in self._problems():
            msg = f"not a routing trace: {problem}"
            raise ValueError(msg)

    def _problems(self) -> Iterator[str]:
        """What does not fit together, the simplest first."""
        for name, dtype in _DTYPES.items():
            values = getattr(self, name)
            if values is not None and values.dtype != dtype:
                yield f"{name} is {values.dtype}, not {np.dtype(dtype)}"
        if self.expert_ids.ndim != 3 or self.expert_ids.shape[1] != self.grid.num_layers:
            yield (
                f"expert_ids is {self.expert_ids.shape}, the grid has {self.grid.num_layers} layers"
            )
        for name in _OPTIONAL:
            values = getattr(self, name)
            if values is not None and values.shape != self.expert_ids.shape:
                yield f"{name} is {values.shape}, expert_ids {self.expert_ids.shape}"
        if len(self.expert_weights) != self.grid.num_layers or min(self.expert_weights) < 1:
            yield f"expert_weights is {self.expert_weights}"
        if (self.step_tokens < 1).any() or self.step_tokens.sum() != self.num_tokens:
            yield f"the steps do not add up to {self.num_tokens} tokens"
        if self.step_is_decode.shape != self.step_tokens.shape:
            yield "step_is_decode and step_tokens differ in length"
        starts = self.prompt_steps.tolist()
        if starts != sorted(set(starts)) or starts[:1] != [0] or starts[-1] >= self.num_steps:
            yield f"prompt_steps is {starts[:5]} ..., of {self.num_steps} steps"
        limits = np.array(self.grid.num_experts)[:, None]
        for ids in (self.expert_ids, self.predicted_ids):
            if ids is not None and bool(((ids >= limits) & (ids != NO_EXPERT)).any()):
                yield "an expert id is beyond the experts of its layer"

    @property
    def num_tokens(self) -> int:
        """Tokens of all steps."""
        return len(self.expert_ids)

    @property
    def num_steps(self) -> int:
        """Forward passes."""
        return len(self.step_tokens)

    @property
    def top_k(self) -> int:
        """Experts of a token, in the layer that takes most."""
        return int(self.expert_ids.shape[2])

    def counts(self, start: int = 0, stop: int | None = None) -> npt.NDArray[np.int64]:
        """Return the pairs routed to each expert by tokens ``start..stop``, of ``grid.shape``."""
        layers, width = self.grid.shape
        ids = self.expert_ids[start:stop]
        is_pair = ids != NO_EXPERT
        cells = ids + np.arange(layers, dtype=np.int64)[:, None] * width
        found = np.bincount(cells[is_pair], minlength=layers * width)
        return found.reshape(layers, width)

    def statistics(self) -> RoutingStatistics:
        """Return how often each expert was chosen, prefill and decode alike."""
        rows = self.counts().tolist()
        counts = (row[:n] for row, n in zip(rows, self.grid.num_experts, strict=True))
        return RoutingStatistics(
            counts=tuple(tuple(map(float, row)) for row in counts), tokens=self.num_tokens
        )

    def split(self, fraction: float) -> tuple[RoutingTrace, RoutingTrace]:
        """Cut in two between prompts, the first as near to this part of the tokens as can be.

        Raises:
            ValueError: There is one prompt only.
        """
        if len(self.prompt_steps) < 2:
            msg = "a trace of one prompt cannot be cut in two between prompts"
            raise ValueError(msg)
        ends = np.concatenate([[0], np.cumsum(self.step_tokens)])[self.prompt_steps]
        cut = 1 + int(np.abs(ends[1:] - fraction * self.num_tokens).argmin())
        step = int(self.prompt_steps[cut])
        return self._between(0, step), self._between(step, self.num_steps)

    def _between(self, first: int, last: int) -> RoutingTrace:
        """The steps ``first..last``; both are where prompts begin or the trace ends."""
        ends = np.concatenate([[0], np.cumsum(self.step_tokens)])
        tokens, steps = slice(ends[first], ends[last]), slice(first, last)
        starts = self.prompt_steps
        return replace(
            self,
            expert_ids=self.expert_ids[tokens],
            weights=None if self.weights is None else self.weights[tokens],
            predicted_ids=None if self.predicted_ids is None else self.predicted_ids[tokens],
            step_tokens=self.step_tokens[steps],
            step_is_decode=self.step_is_decode[steps],
            prompt_steps=starts[(starts >= first) & (starts < last)] - first,
        )


def save_trace(trace: RoutingTrace, file: Path) -> None:
    """Write a trace; the file appears whole or not at all.

    Raises:
        TraceError: It cannot be written.
    """
    tensors = {name: getattr(trace, name) for name in _DTYPES}
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "model": trace.model,
        "num_experts": json.dumps(trace.grid.num_experts),
        "expert_bytes": json.dumps(trace.grid.expert_bytes),
        "expert_weights": json.dumps(trace.expert_weights),
        "dense_bytes": json.dumps(trace.dense_bytes),
    }
    present = {k: np.ascontiguousarray(v) for k, v in tensors.items() if v is not None}
    try:
        with replacing(file) as temporary:
            save_file(present, temporary, metadata)
    except (OSError, SafetensorError) as error:
        msg = f"cannot write the trace {str(file)!r}: {error}. Choose another file or make room."
        raise TraceError(msg) from error


def load_trace(file: Path) -> RoutingTrace:
    """Read a trace.

    Raises:
        TraceError: There is no such file, or it is no trace that this version reads.
    """
    try:
        with safe_open(file, framework="numpy") as stored:
            metadata: Mapping[str, str] = stored.metadata() or {}
            _check_version(file, metadata)
            names = set(stored.keys())
            arrays = {name: stored.get_tensor(name) for name in _DTYPES if name in names}
        return _from_parts(metadata, arrays)
    except FileNotFoundError as error:
        msg = f"there is no trace {str(file)!r}; `kt trace MODEL --prompts FILE -o TRACE` makes one"
        raise TraceError(msg) from error
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        msg = (
            f"{str(file)!r} is no routing trace or a damaged one "
            f"({type(error).__name__}: {error}); record it again with `kt trace`"
        )
        raise TraceError(msg) from error


def _check_version(file: Path, metadata: Mapping[str, str]) -> None:
    found = (metadata.get("format"), metadata.get("version"))
    if found[0] != FORMAT:
        msg = (
            f"{str(file)!r} is a safetensors file but no routing trace (its metadata lack "
            f"format={FORMAT}); `kt trace MODEL --prompts FILE -o TRACE` makes one"
        )
        raise TraceError(msg)
    if found[1] != VERSION:
        msg = (
            f"{str(file)!r} is a routing trace of version {found[1]!r}, this kt reads version "
            f"{VERSION!r}; record it again, or use the kt that wrote it"
        )
        raise TraceError(msg)


def _from_parts(metadata: Mapping[str, str], arrays: dict[str, Any]) -> RoutingTrace:
    return RoutingTrace(
        model=metadata["model"],
        grid=ExpertGrid(
            num_experts=tuple(json.loads(metadata["num_experts"])),
            expert_bytes=tuple(json.loads(metadata["expert_bytes"])),
        ),
        expert_weights=tuple(json.loads(metadata["expert_weights"])),
        dense_bytes=int(json.loads(metadata["dense_bytes"])),
        **arrays,
    )
