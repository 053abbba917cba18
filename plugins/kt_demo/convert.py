"""From a dense GGUF file to a Mixture-of-Experts checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kt_core.interfaces import no_progress
from kt_demo.calibration import calibration_dialogues, token_rows
from kt_demo.checkpoint import moe_config, moe_tensors, write_checkpoint
from kt_demo.dense import load_dense
from kt_demo.gguf import GgufFile
from kt_demo.split import split_model
from kt_demo.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

    from kt_core.interfaces import Progress
    from kt_demo.recipe import MoeShape


def convert(
    gguf: Path, folder: Path, *, shape: MoeShape, seed: int, progress: Progress = no_progress
) -> None:
    """Write the checkpoint made of ``gguf`` into ``folder``, which must not exist.

    The same bytes on the same machine with the same libraries and number of threads.
    """
    progress("reading the dense model", None)
    file = GgufFile(gguf)
    tokenizer = load_tokenizer(file.metadata)
    dense = load_dense(file)
    rows = token_rows(calibration_dialogues(), tokenizer)
    splits = split_model(dense, rows, shape, seed=seed, progress=progress)
    progress("writing the checkpoint", None)
    config, tensors = moe_config(dense.config, shape), moe_tensors(dense, splits)
    del dense  # 0.5 GB that writing, which copies the tensors once more, can use
    write_checkpoint(folder, config, tensors, tokenizer)
