"""``kt quant``, ``kt verify`` and ``kt cache`` as a person calls them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cli.calling import Kt


@pytest.fixture
def packed(kt: Kt, stories: Path, tmp_path: Path) -> Path:
    target = tmp_path / "packed"
    kt("quant", stories, target, "--format", "int4", "--threads", 1).succeeds()
    return target


def test_quant_says_what_it_did(kt: Kt, stories: Path, tmp_path: Path) -> None:
    target = tmp_path / "packed"
    out = kt("quant", stories, target, "--format", "int4", "--threads", 1).succeeds()
    assert "bits per weight" in out
    assert "int4-g32" in out
    assert f"packed model  {target}" in out
    report = json.loads(
        kt("quant", stories, tmp_path / "two", "--format", "mxfp4", "--json").succeeds()
    )
    assert set(report) == {
        "target", "method", "layers", "dense_layers", "resumed_files", "expert_bytes",
        "dense_bytes", "seconds", "evaluation",
    }  # fmt: skip
    assert report["method"] == "search"
    assert {layer["format"] for layer in report["layers"]} == {"mxfp4"}


def test_run_on_what_was_packed(kt: Kt, packed: Path) -> None:
    answer = json.loads(
        kt("run", packed, "Once upon", "--raw", "--json", "--max-new-tokens", 4).succeeds()
    )
    assert answer["format"] == "int4-g32"
    assert answer["new_tokens"] == 4


def test_overrides(kt: Kt, stories: Path, tmp_path: Path) -> None:
    file = tmp_path / "layers.yaml"
    file.write_text('"*.layers.0.*": int8\n')
    arguments = ("quant", stories, tmp_path / "packed", "--format", "int4", "--overrides", file)
    report = json.loads(kt(*arguments, "--json").succeeds())
    first, *others = (layer["format"] for layer in report["layers"])
    assert first == "int8"
    assert set(others) == {"int4-g32"}


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("- a\n- b\n", "must hold lines of the form"),
        ("a: {b: c}\n", "must hold lines of the form"),
        ("a: [\n", "cannot be read"),
        ('"*.layers.99.*": int8\n', "matches no experts"),
        ('"*.layers.0.mlp.experts.3": int8\n', "one kernel computes all experts of a layer"),
        ('"*.experts.[01].up_proj": int8\n', "Name the whole layer: 'model.layers.0.mlp.exp"),
        ('"lm_head": int8\n', "Dense layers are packed with --dense-format only"),
        ('"*": none\n', "experts cannot stay as they are"),
        ('"*": int5\n', "int5"),
    ],
)
def test_bad_overrides(kt: Kt, stories: Path, tmp_path: Path, text: str, why: str) -> None:
    file = tmp_path / "layers.yaml"
    file.write_text(text)
    target = tmp_path / "packed"
    outcome = kt("quant", stories, target, "--format", "int4", "--overrides", file)
    outcome.fails(why, code=1 if "int5" in why else 2)
    assert not target.exists()


def test_bad_arguments(kt: Kt, stories: Path, tmp_path: Path, packed: Path) -> None:
    target = tmp_path / "new"
    kt("quant", stories, target, "--format", "auto").fails("say what the experts shall", code=2)
    kt("quant", stories, target, "--format", "int5").fails("int5")
    kt("quant", stories, target, "--format", "int4", "--method", "best").fails("rtn", code=2)
    kt("quant", stories, packed, "--format", "int4").fails("exists already", code=2)
    kt("quant", packed, target, "--format", "int4").fails("packed by kt already")
    kt("quant", tmp_path / "none", target, "--format", "int4").fails("none")
    kt("verify", stories).fails("is not packed by kt")
    assert not target.exists()


def test_verify(kt: Kt, packed: Path) -> None:
    assert "files are as they were written" in kt("verify", packed).succeeds()
    file = sorted(packed.glob("experts-*"))[0]
    content = bytearray(file.read_bytes())
    content[4096] ^= 1
    file.write_bytes(content)
    outcome = kt("verify", packed)
    assert outcome.code == 1
    assert f"expert 0 of model.layers.0.mlp.experts in {file.name} is damaged" in outcome.out
    answer = kt("verify", packed, "--json")
    assert answer.code == 1
    assert len(json.loads(answer.out)["damaged"]) == 1


def test_going_on(kt: Kt, stories: Path, tmp_path: Path) -> None:
    """It is said, and the report counts it."""
    from kt_core.engine.quantize import unfinished

    target = tmp_path / "packed"
    unfinished(target).mkdir()
    outcome = kt("quant", stories, target, "--format", "int4")
    outcome.succeeds()
    assert "going on with" in outcome.err


def test_the_cache(kt: Kt, stories: Path) -> None:
    assert "holds nothing" in kt("cache", "list").succeeds()
    run = ("run", stories, "Once", "--raw", "--max-new-tokens", 2, "--format", "int4", "--json")
    answers = [json.loads(kt(*run, *more).succeeds())["text"] for more in ([], ["--cache"])]
    (model,) = json.loads(kt("cache", "list", "--json").succeeds())
    assert model["is_finished"]
    assert model["name"] in kt("cache", "list").succeeds()
    del answers
    assert "removed 1 models" in kt("cache", "clear").succeeds()
    assert "holds nothing" in kt("cache", "list").succeeds()
    kt("run", stories, "Once", "--raw", "--cache").fails("give a format", code=2)
