"""What a model's experts are given when it reads a text: which weights matter, and how much.

The model runs in our own engine. Of each layer the hidden states that its experts were given are
kept, and where they were sent. What an input of a projection is worth is its mean square over the
tokens that the expert got, each counting as much as any other: the error of a weight counts as much
in the output as the input it is multiplied with. For the down projection that is taken of what gate
and up make of these tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional

from kt_core.engine.engine import Engine, load
from kt_core.engine.text_windows import token_windows
from kt_core.interfaces import ExpertWeights, Progress
from kt_core.moe.activations import activate
from kt_core.moe.hybrid_experts import HybridExperts
from kt_core.paths import replacing
from kt_core.plugins import Registry
from kt_core.types import MoeSpec

TOKENS = 4096
"""Of the text: more are left out."""
# Of the tokens that went to an expert so many are looked at: a mean square needs no more.
_OWN_TOKENS = 512
# So many of all tokens are counted among an expert's own, which may be few, or none.
_SHARED_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Calibration:
    """Hidden states and routing of every layer, in files of a folder."""

    folder: Path

    def importance(
        self, layer: int, expert: int, weights: ExpertWeights, spec: MoeSpec
    ) -> dict[str, torch.Tensor]:
        """Return the worth of the inputs of each projection, by its name: ``[in]`` float32.

        Args:
            layer: Number of the layer, counted over those with experts.
            expert: Which of its experts.
            weights: The expert as it is in the source; dense.
            spec: The layer.
        """
        stored = load_file(self.folder / _file_name(layer))
        own = (stored["ids"] == expert).any(dim=1).nonzero()[:_OWN_TOKENS, 0]
        count = len(stored["hidden"])
        shared = torch.linspace(0, count - 1, min(count, _SHARED_TOKENS)).long()
        hidden = stored["hidden"][torch.cat([own, shared])].float()
        outer, down = (_worth(x) for x in (hidden, _between(hidden, weights, spec)))
        return {"gate": outer, "up": outer, "down": down}


def calibrate(
    source: Path,
    text: str,
    folder: Path,
    registry: Registry,
    *,
    threads: int | None,
    progress: Progress,
) -> Calibration:
    """Run the source over a text; keep what its experts were given in files of ``folder``.

    Where the files are there, an earlier run made them, and they are used again.

    Raises:
        KtError: The source cannot be loaded, or the text is too short.
    """
    folder.mkdir(exist_ok=True)
    done = folder / "done"
    if done.exists():
        return Calibration(folder)
    with load(source, threads=threads, registry=registry, progress=progress) as engine:
        windows = token_windows(engine, text, TOKENS)
        seen: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in engine.kernels]
        with _watching(engine, seen), torch.inference_mode():
            for number, window in enumerate(windows):
                progress("reading the calibration text", number / len(windows))
                engine.model(input_ids=torch.tensor([window]), use_cache=False)
    for layer, steps in enumerate(seen):
        hidden, ids = (torch.cat(parts) for parts in zip(*steps, strict=True))
        with replacing(folder / _file_name(layer)) as temporary:
            save_file({"hidden": hidden, "ids": ids}, temporary)
    done.touch()
    return Calibration(folder)


@contextmanager
def _watching(
    engine: Engine, seen: list[list[tuple[torch.Tensor, torch.Tensor]]]
) -> Iterator[None]:
    numbers = {id(kernel): number for number, kernel in enumerate(engine.kernels)}

    def watch(number: int) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
            del module
            named = dict(zip(("hidden_states", "top_k_index"), arguments, strict=False)) | options
            hidden, ids = named["hidden_states"], named["top_k_index"]
            rows = hidden.detach().reshape(-1, hidden.shape[-1]).bfloat16().cpu()
            seen[number].append((rows.clone(), ids.detach().reshape(len(rows), -1).int().cpu()))

        return hook

    modules = [m for m in engine.model.modules() if isinstance(m, HybridExperts)]
    hooks = [
        module.register_forward_pre_hook(watch(numbers[id(module.kernels[0])]), with_kwargs=True)
        for module in modules
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _between(hidden: torch.Tensor, weights: ExpertWeights, spec: MoeSpec) -> torch.Tensor:
    """``[tokens, intermediate]``: what the down projection gets."""

    def product(matrix: Any, bias: torch.Tensor | None) -> torch.Tensor:
        return functional.linear(hidden, matrix.float(), None if bias is None else bias.float())

    up = product(weights.up, weights.up_bias)
    if weights.gate is None:
        return activate(spec.activation, up)
    return activate(spec.activation, product(weights.gate, weights.gate_bias), up)


def _worth(inputs: torch.Tensor) -> torch.Tensor:
    """Mean square of each input, every token counting as much: few have most of all squares.

    On the demo model the KL divergence is 3 % and 7 % less than without (two texts).
    """
    squares = inputs.square()
    return (squares / squares.mean(dim=1, keepdim=True).clamp(min=1e-30)).mean(dim=0)


def _file_name(layer: int) -> str:
    return f"layer-{layer:05}.safetensors"
