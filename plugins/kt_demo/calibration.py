"""The text on which neurons are seen at work, as token rows.

``data/calibration.txt`` was written for this purpose: blocks of one question (first line) and one
answer (the other lines, empty ones included), separated by a line of ``---``.
"""

from __future__ import annotations

from importlib.resources import files
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_SEPARATOR = "\n---\n"


def calibration_dialogues() -> list[tuple[str, str]]:
    """Return the questions with their answers."""
    text = (files("kt_demo") / "data" / "calibration.txt").read_text(encoding="utf-8")
    pairs = (block.partition("\n") for block in text.strip().split(_SEPARATOR))
    return [(question, answer) for question, _, answer in pairs]


def token_rows(
    dialogues: list[tuple[str, str]], tokenizer: PreTrainedTokenizerFast, *, row_tokens: int = 512
) -> torch.Tensor:
    """Return the dialogues in the chat template, end to end, as [rows, row_tokens].

    What does not fill the last row is left out; a row may begin inside a dialogue.
    """
    token_ids: list[int] = []
    for question, answer in dialogues:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
            tokenize=False,
        )
        token_ids += tokenizer(text, add_special_tokens=False)["input_ids"]
    num_rows = len(token_ids) // row_tokens
    return torch.tensor(token_ids[: num_rows * row_tokens]).view(num_rows, row_tokens)
