"""Bad input of ``kt run``: one clear line on stderr, nothing on stdout, and advice that works."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from cli.calling import CHAT_TEMPLATE, STORIES, Kt, edit_json
from kt_core import hardware
from kt_core.cli.output import LogHandler
from kt_cpu import _kernels

QUICK = ("--threads", "1", "--max-new-tokens", "2")
EXPERT = "model.layers.2.mlp.experts.3.up_proj.weight"


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a random model in several shards."""
    directory = tmp_path_factory.mktemp("shards")
    tiny.save_tiny("qwen3_moe", directory)
    return directory


def spoil_tensor(file: Path, name: str, replacement: torch.Tensor) -> None:
    save_file({**load_file(file), name: replacement}, file, metadata={"format": "pt"})


def an_expert_tensor(file: Path) -> str:
    return next(name for name in sorted(load_file(file)) if ".experts.3." in name)


# --- the model ---------------------------------------------------------------------------------


def test_missing_directory(kt: Kt, tmp_path: Path) -> None:
    message = kt("run", tmp_path / "absent", "hi").fails(str(tmp_path / "absent"), "directory")
    assert "(known: demo)" in message


def test_hub_id_without_network(kt: Kt, monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot_download(*args: object, **kwargs: object) -> str:
        del args, kwargs
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    kt("run", "nobody/nothing", "hi").fails(
        "'nobody/nothing'", "could not be downloaded", "the path of a directory"
    )


def test_a_file_instead_of_a_directory(kt: Kt, stories: Path) -> None:
    kt("run", stories / "model.safetensors", "hi").fails("is a file", "give the directory")


def test_directory_without_config(kt: Kt, tmp_path: Path) -> None:
    kt("run", tmp_path, "hi").fails(str(tmp_path), "no config.json")


def test_dense_model(kt: Kt, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "vocab_size": 64}
    LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2)).save_pretrained(tmp_path)
    kt("run", tmp_path, "hi", *QUICK).fails("dense", "transformers, vLLM or llama.cpp")


def test_unknown_model_type(kt: Kt, model: Path) -> None:
    edit_json(model / "config.json", model_type="swoosh")
    kt("run", model, "hi", *QUICK).fails("'swoosh'", "Update transformers", "docs/add-a-model.md")


# --- its files ---------------------------------------------------------------------------------


def test_truncated_shard(kt: Kt, model: Path) -> None:
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    kt("run", model, "hi", *QUICK).fails(str(file), "cut off", "Download it again")


def test_truncated_header(kt: Kt, model: Path) -> None:
    (model / "model.safetensors").write_bytes(struct.pack("<Q", 5000) + b"{")
    kt("run", model, "hi", *QUICK).fails("damaged", "Download it again")


def test_shard_missing_from_the_index(kt: Kt, shards: Path, model: Path) -> None:
    for file in shards.iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    index = model / "model.safetensors.index.json"
    files = json.loads(index.read_text())["weight_map"]
    last = max(files.values())
    kept = {name: file for name, file in files.items() if file != last}
    edit_json(index, weight_map=kept)
    kt("run", model, "hi", *QUICK).fails("A shard may be missing")


def test_shard_that_is_not_there(kt: Kt, shards: Path, model: Path) -> None:
    for file in shards.iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    gone = sorted(model.glob("model-*.safetensors"))[1]
    gone.unlink()
    kt("run", model, "hi", *QUICK).fails(gone.name, "not there", "Download the missing files")


def test_expert_of_a_wrong_shape(kt: Kt, model: Path) -> None:
    file = model / "model.safetensors"
    name = an_expert_tensor(file)
    spoil_tensor(file, name, torch.zeros(24, 128, dtype=torch.bfloat16))
    kt("run", model, "hi", *QUICK).fails(name.rpartition(".experts.")[0])


def test_nan_in_an_expert(kt: Kt, model: Path) -> None:
    file = model / "model.safetensors"
    name = an_expert_tensor(file)
    weight = load_file(file)[name]
    weight.view(-1)[5] = float("nan")
    spoil_tensor(file, name, weight)
    kt("run", model, "hi", *QUICK).fails("expert 3 of", "NaN", name)


# --- the tokenizer and the prompt ----------------------------------------------------------------


def test_no_tokenizer(kt: Kt, model: Path) -> None:
    for file in model.glob("tokenizer*"):
        file.unlink()
    kt("run", model, "hi", *QUICK).fails("no tokenizer", "copy it", "from the original model")
    for file in STORIES.glob("tokenizer*"):  # what the message advises
        (model / file.name).write_bytes(file.read_bytes())
    kt("run", model, "hi", *QUICK).succeeds()


def test_system_message_without_chat_template(kt: Kt, model: Path) -> None:
    arguments = ("run", model, "hi", *QUICK)
    message = kt(*arguments, "--system", "Be brief.").fails("no chat template")
    assert "add a chat_template.jinja to the model directory" in message
    kt(*arguments, "--raw").succeeds()
    (model / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    kt(*arguments, "--system", "Be brief.").succeeds()


def test_prompt_longer_than_the_context(kt: Kt, model: Path) -> None:
    edit_json(model / "config.json", max_position_embeddings=16)
    words = 30 * ["fox"]
    message = kt("run", model, *words, *QUICK).fails("the model's context holds 16", "shorten")
    excess = int(re.search(r"shorten it by at least (\d+)", message)[1])  # type: ignore[index]
    prompt = int(re.search(r"the prompt has (\d+) tokens", message)[1])  # type: ignore[index]
    assert prompt - excess == 15
    kt("run", model, *words[:10], *QUICK).succeeds()


# --- what was asked for --------------------------------------------------------------------------


def test_unknown_format(kt: Kt, stories: Path) -> None:
    message = kt("run", stories, "hi", "--format", "int3", *QUICK).fails("format 'int3'")
    for name in re.findall(r"int4-g64\b|int8\b", message):  # what the message offers
        kt("run", stories, "hi", "--format", name, *QUICK).succeeds()
    assert "int4-g64" in message


def test_unknown_device(kt: Kt, stories: Path) -> None:
    message = kt("run", stories, "hi", "--device", "tpu:7", *QUICK).fails("'tpu:7'")
    assert "cpu" in message


def test_unknown_isa(kt: Kt, stories: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KT_FORCE_ISA", "neon9")
    message = kt("run", stories, "hi", *QUICK).fails("KT_FORCE_ISA=neon9")
    named = [name for name, _ in _kernels.isas() if re.search(rf"\b{name}\b", message)]
    assert "scalar" in named
    monkeypatch.setenv("KT_FORCE_ISA", "scalar")
    kt("run", stories, "hi", *QUICK).succeeds()


def test_absent_isa(kt: Kt, stories: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    absent = [name for name, is_here in _kernels.isas() if not is_here]
    if not absent:

        def select_isa(name: str) -> str:
            msg = f"this CPU lacks {name}"
            raise RuntimeError(msg)

        monkeypatch.setattr(_kernels, "select_isa", select_isa)
        absent = ["avx512"]
    monkeypatch.setenv("KT_FORCE_ISA", absent[0])
    kt("run", stories, "hi", *QUICK).fails(f"KT_FORCE_ISA={absent[0]}")


def test_not_enough_memory(kt: Kt, stories: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "available_memory_bytes", lambda: 300_000_000)
    message = kt("run", stories, "hi", *QUICK).fails("not enough memory")
    assert re.search(r"needs \d\.\d\d GB as bf16", message)
    assert "0.30 GB are available" in message


def test_unknown_dense_format(kt: Kt, stories: Path) -> None:
    kt("run", stories, "hi", "--dense-format", "int5", *QUICK).fails("'int5'", "int8")


def test_advice_for_too_little_memory(
    kt: Kt, stories: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reports = [
        json.loads(kt("run", stories, "hi", "--format", name, "--json", *QUICK).succeeds())
        for name in ("int4", "bf16")
    ]
    small, large = (report["expert_bytes"] + report["dense_bytes"] for report in reports)
    assert small < large
    middle = 300_000_000 + (small + large) // 2
    monkeypatch.setattr(hardware, "available_memory_bytes", lambda: middle)
    kt("run", stories, "hi", "--format", "bf16", *QUICK).fails("--format int4")
    kt("run", stories, "hi", "--format", "int4", *QUICK).succeeds()


def test_more_threads_than_cores_is_a_warning(kt: Kt, stories: Path) -> None:
    import logging

    logger, handler = logging.getLogger("kt_core"), LogHandler()
    logger.addHandler(handler)
    try:
        outcome = kt("run", stories, "hi", "--threads", "500", "--max-new-tokens", "1")
    finally:
        logger.removeHandler(handler)
        torch.set_num_threads(1)
    outcome.succeeds()
    warning, *_ = outcome.err.splitlines()
    assert warning.startswith("warning: 500 threads were asked for, ")
