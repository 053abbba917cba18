"""What a model's experts are given when it reads a text: in which directions errors matter.

The model runs in our own engine. Of each layer the hidden states that its experts were given are
kept, and where they were sent, in files: memory holds one window of text.
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

from kt_core.engine.engine import Engine, load
from kt_core.engine.expert_inputs import ExpertInputs
from kt_core.engine.text_windows import token_windows
from kt_core.interfaces import Progress
from kt_core.moe.hybrid_experts import HybridExperts
from kt_core.paths import replacing
from kt_core.plugins import Registry

TOKENS = 4096
"""Of the text: more are left out."""
# An expert may get few tokens, or none. So it is given some of all tokens, too, which together
# count as much as so many of its own.
_SHARED_TOKENS = 256
_SHARED_WEIGHT = 16.0


@dataclass(frozen=True, slots=True)
class Calibration:
    """Hidden states and routing of every layer, in files of a folder."""

    folder: Path

    def inputs(self, layer: int, expert: int) -> ExpertInputs:
        """Return what an expert was given.

        Args:
            layer: Number of the layer, counted over those with experts.
            expert: Which of its experts.
        """
        parts = [load_file(file) for file in sorted(self.folder.glob(f"layer-{layer:05}.*"))]
        step = -(-sum(len(part["ids"]) for part in parts) // _SHARED_TOKENS)
        own = torch.cat([p["hidden"][(p["ids"] == expert).any(dim=1)] for p in parts])
        shared = torch.cat([part["hidden"][::step] for part in parts])
        shares = torch.ones(len(own) + len(shared))
        shares[len(own) :] = _SHARED_WEIGHT / len(shared)
        return ExpertInputs(torch.cat([own, shared]).float(), shares)


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
        with _watching(engine, folder), torch.inference_mode():
            for number, window in enumerate(windows):
                progress("reading the calibration text", number / len(windows))
                engine.model(input_ids=torch.tensor([window]), use_cache=False)
    done.touch()
    return Calibration(folder)


@contextmanager
def _watching(engine: Engine, folder: Path) -> Iterator[None]:
    """Write a file for each layer and pass: ``layer-00003.00007.safetensors``."""
    numbers = {id(kernel): number for number, kernel in enumerate(engine.kernels)}
    passes = [0] * len(numbers)

    def watch(layer: int) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
            del module
            named = dict(zip(("hidden_states", "top_k_index"), arguments, strict=False)) | options
            hidden, ids = named["hidden_states"].detach(), named["top_k_index"].detach()
            rows = hidden.reshape(-1, hidden.shape[-1]).bfloat16().cpu().contiguous()
            file = folder / f"layer-{layer:05}.{passes[layer]:05}.safetensors"
            passes[layer] += 1
            with replacing(file) as temporary:
                save_file(
                    {"hidden": rows, "ids": ids.reshape(len(rows), -1).int().cpu()}, temporary
                )

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
