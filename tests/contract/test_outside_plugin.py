"""A plug-in from outside, as a stranger would meet it: wheels, a fresh environment, ``kt run``."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "outside_backend"
STORIES = ROOT / "tests" / "data" / "stories-moe"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a virtual environment that has both wheels, and everything else from this one."""
    wheels = tmp_path_factory.mktemp("wheels")
    # Compiled where the next run finds the objects again, apart from any other build.
    build_dir = ROOT / "build" / "outside_plugin" / "{wheel_tag}"
    _build(ROOT, wheels, "scikit_build_core", "pybind11", config=f"build-dir={build_dir}")
    copy = shutil.copytree(EXAMPLE, tmp_path_factory.mktemp("source") / "kt-outside")
    _build(copy, wheels, "setuptools")  # setuptools leaves its build folder beside the source

    folder = tmp_path_factory.mktemp("venv")
    _run(sys.executable, "-m", "venv", "--without-pip", str(folder))
    target = next(folder.glob("lib/python*/site-packages"))
    pip = (sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"), "install")
    _run(*pip, "--no-deps", "--no-index", *map(str, wheels.glob("*.whl")))
    # A folder named in a .pth file comes after the environment's own, and the .pth files in it are
    # not read: torch is found there, this checkout is not.
    shared = sysconfig.get_path("purelib")
    (target / "shared.pth").write_text(f"{shared}\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a checkpoint of the family that only the plug-in knows."""
    folder = shutil.copytree(STORIES, tmp_path_factory.mktemp("model") / "outside-moe")
    file = folder / "config.json"
    facts = json.loads(file.read_text(encoding="utf-8"))
    facts["model_type"] = "outside_moe"
    facts["architectures"] = ["OutsideMoeForCausalLM"]
    facts["n_experts"] = facts.pop("num_local_experts")
    facts["expert_size"] = facts.pop("moe_intermediate_size")
    file.write_text(json.dumps(facts), encoding="utf-8")
    return folder


def test_both_come_from_their_wheels(environment: Path) -> None:
    names = ("kt_core", "kt_cpu._kernels", "kt_models", "kt_outside")
    script = "".join(f"import {name}; print({name}.__file__)\n" for name in names)
    for line in _python(environment, "-c", script).splitlines():
        assert Path(line).is_relative_to(environment), line


def test_its_own_tests_pass(environment: Path, tmp_path: Path) -> None:
    for name in ("pyproject.toml", "tests"):  # without the package: that must come from the wheel
        source = EXAMPLE / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    output = _python(
        environment, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", cwd=tmp_path
    )
    assert " passed" in output
    # What it says it cannot do, and nothing else.
    skipped = [line for line in output.splitlines() if line.startswith("SKIPPED")]
    allowed = ("does not train", "computes no dense layers", "cannot move packed experts")
    assert all(any(reason in line for reason in allowed) for line in skipped), skipped


def test_kt_lists_it(environment: Path) -> None:
    listed = json.loads(_kt(environment, "backends", "--json"))
    assert "slowpoke" in json.dumps(listed)


@pytest.mark.parametrize("weight_format", ["bf16", "int4", "int4-row"])
def test_kt_runs_it(environment: Path, model: Path, weight_format: str) -> None:
    answer = _answer(environment, model, "--device", "slowpoke", "--format", weight_format)
    assert answer["device"] == "slowpoke"
    assert set(answer["placement"]) == {"slowpoke"}
    assert len(answer["token_ids"]) == 12
    assert answer["text"].strip()


def test_the_cpu_runs_its_model_and_auto_takes_the_cpu(environment: Path, model: Path) -> None:
    assert _answer(environment, model)["device"] == "cpu"


def test_without_the_plugin_the_model_is_unknown(environment: Path, model: Path) -> None:
    failed = subprocess.run(
        [environment / "bin" / "kt", "run", model, "Once", "--raw"],
        env=_clean() | {"KT_BLOCK_PLUGINS": "outside"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert failed.returncode == 1
    assert "outside_moe" in failed.stderr


def _build(source: Path, wheels: Path, *needed: str, config: str | None = None) -> None:
    """Build a wheel; with what is installed here where that suffices, it is faster."""
    options = ["--no-deps", "--quiet", "--wheel-dir", str(wheels)]
    if all(find_spec(name) for name in needed):
        options.append("--no-build-isolation")
    if config is not None:
        options += ["--config-settings", config]
    _run(sys.executable, "-m", "pip", "wheel", *options, str(source))


def _answer(environment: Path, model: Path, *options: str) -> dict[str, Any]:
    prompt = "Once upon a time"
    fixed = ("--raw", "--json", "--temperature", "0", "--max-new-tokens", "12", "--threads", "1")
    parsed: dict[str, Any] = json.loads(
        _kt(environment, "run", str(model), prompt, *fixed, *options)
    )
    return parsed


def _kt(environment: Path, *arguments: str) -> str:
    return _run(str(environment / "bin" / "kt"), *arguments)


def _python(environment: Path, *arguments: str, cwd: Path | None = None) -> str:
    return _run(str(environment / "bin" / "python"), *arguments, cwd=cwd or environment)


def _clean() -> dict[str, str]:
    """Return the environment without what would lead back to this checkout."""
    return {n: v for n, v in os.environ.items() if not n.startswith(("KT_", "PYTHON", "PYTEST"))}


def _run(*command: str, cwd: Path | None = None) -> str:
    done = subprocess.run(
        command, cwd=cwd, env=_clean(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-4000:]}{done.stderr[-4000:]}"
    return done.stdout
