"""Prompts to tokens: the model's own tokenizer and chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from kt_core.errors import TokenizerError

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")


def load_tokenizer(directory: Path, config: PreTrainedConfig) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer of a model directory; None where it has none.

    Args:
        directory: The model directory.
        config: Its config, which transformers may be unable to read itself.

    Raises:
        TokenizerError: There is one, but it cannot be read.
    """
    if not any((directory / name).is_file() for name in _TOKENIZER_FILES):
        return None
    try:
        # Asked about code of the repository's own, transformers would wait for an answer.
        tokenizer = AutoTokenizer.from_pretrained(directory, config=config, trust_remote_code=False)
        return cast("PreTrainedTokenizerBase", tokenizer)
    except Exception as error:  # the tokenizers library raises plain Exception
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        msg = (
            f"the tokenizer in {directory} cannot be loaded: {reason}. "
            "Download its files again, or take them away to run on token ids alone."
        )
        raise TokenizerError(msg) from error


def prompt_tokens(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | Sequence[Mapping[str, str]],
    *,
    raw: bool,
) -> list[int]:
    """Return the tokens of a text or of messages.

    Raises:
        TokenizerError: Messages were given, but the tokenizer has no chat template, or one that
            refuses them.
    """
    if isinstance(prompt, str) and (raw or not tokenizer.chat_template):
        return list(tokenizer(prompt)["input_ids"])
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    if not tokenizer.chat_template:
        msg = (
            "this model's tokenizer has no chat template, so it cannot take messages: give a text "
            "(on the command line: --raw), or add a chat_template.jinja to the model directory"
        )
        raise TokenizerError(msg)
    try:
        tokens: Any = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
        )
    except TemplateError as error:  # a template may refuse: many have no system role
        roles = ", ".join(str(message.get("role")) for message in messages)
        msg = (
            f"the model's chat template does not take these messages (roles: {roles}): {error}. "
            "Leave out what it names, or give a text without the template (--raw)"
        )
        raise TokenizerError(msg) from error
    return list(tokens["input_ids"])
