"""The tokenizer of a GGUF file, as Hugging Face's own files."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kt_core.errors import ModelSourceError

if TYPE_CHECKING:
    from collections.abc import Mapping

_CONTROL_TOKEN = 3  # LLAMA_TOKEN_TYPE_CONTROL in llama.cpp's llama.h
_ALGORITHM = ("gpt2", "smollm")  # byte-level BPE, and how text is cut before it


def load_tokenizer(metadata: Mapping[str, Any]) -> PreTrainedTokenizerFast:
    """Build the tokenizer, chat template included."""
    algorithm = (metadata["tokenizer.ggml.model"], metadata["tokenizer.ggml.pre"])
    if algorithm != _ALGORITHM:
        msg = (
            f"a GGUF file with tokenizer {algorithm!r} cannot become the demo model: "
            f"the conversion knows {_ALGORITHM!r}.\nUse the file that kt_demo.fetch names."
        )
        raise ModelSourceError(msg)
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    # llama.cpp's LLAMA_VOCAB_PRE_TYPE_SMOLLM: every digit alone, then GPT-2's rule.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = metadata["tokenizer.ggml.token_type"]
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in control])

    def named(role: str) -> str:
        return tokens[int(metadata[f"tokenizer.ggml.{role}_token_id"])]

    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        bos_token=named("bos"),
        eos_token=named("eos"),
        unk_token=named("unknown"),
        pad_token=named("padding"),
        chat_template=metadata["tokenizer.chat_template"],
        model_max_length=metadata["llama.context_length"],
        clean_up_tokenization_spaces=False,
    )
