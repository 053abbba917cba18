"""What ``kt_sim`` says where its device is not compiled: nothing here needs it."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kt_core.errors import BackendUnavailableError
from kt_core.packed.codec import pack
from kt_core.quant import BUILT_IN_FORMATS
from kt_core.testing.backend_harness import random_layer
from kt_core.types import MoeSpec
from kt_sim import Settings, SimBackend, build
from kt_sim.decoded import DecodedExpert, DecodedExperts
from kt_sim.settings import VARIABLE, from_environment, parse


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv(VARIABLE, raising=False)
    return tmp_path


def test_it_says_how_to_compile_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "why_not_buildable", lambda: None)
    reason = SimBackend().why_unavailable()
    assert reason is not None
    assert "run `python -m kt_sim`" in reason


def test_it_says_what_is_missing_to_compile_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "no C++ compiler 'c++'" in (SimBackend().why_unavailable() or "")
    with pytest.raises(BackendUnavailableError, match="cannot be compiled: no C\\+\\+ compiler"):
        build.build()
    monkeypatch.setenv("CXX", "sh")
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.setattr(build.shutil, "which", lambda name: None if name == "ninja" else name)
    assert "pip install 'kt-core[sim]'" in (SimBackend().why_unavailable() or "")
    monkeypatch.setattr(build, "_torch_version", lambda: "2.12.1+cpu")
    assert "needs torch 2.13 or newer" in (SimBackend().why_unavailable() or "")


def test_a_failed_compilation_says_what_the_compiler_said_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = tmp_path / "csrc"
    sources.mkdir()
    (sources / "broken.cpp").write_text('#error "this is not C++"\n', encoding="utf-8")
    monkeypatch.setattr(build, "_SOURCES", sources)
    if why := build.why_not_buildable():
        pytest.skip(why)
    with pytest.raises(BackendUnavailableError, match="this is not C"):
        build.build()
    assert not build.library_path().exists()
    assert [path.name for path in (tmp_path / "kt" / "sim").iterdir()] == ["lock"]


def test_the_cache_knows_sources_and_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = build.library_path()
    assert first == build.library_path()
    monkeypatch.setattr(build, "_torch_version", lambda: "2.14.0")
    assert build.library_path() != first
    (tmp_path / "other.cpp").write_text("", encoding="utf-8")
    monkeypatch.undo()
    monkeypatch.setattr(build, "_SOURCES", tmp_path)
    assert build.library_path().parent.name != first.parent.name


def test_asking_imports_no_torch() -> None:
    program = (
        "import sys; from kt_sim import SimBackend; SimBackend().why_unavailable(); "
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-P", "-c", program], check=True)


def test_settings_from_words_and_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert from_environment() == Settings()
    monkeypatch.setenv(VARIABLE, "devices=2, memory_gib=0.5")
    assert from_environment() == Settings(devices=2, memory_gib=0.5)
    file = tmp_path / "machine.yaml"
    file.write_text("devices: 3\nlink_gb_s: 50\n", encoding="utf-8")
    assert parse(str(file)) == Settings(devices=3, link_gb_s=50)
    assert Settings.of_native(Settings(devices=3).native()) == Settings(devices=3)


@pytest.mark.parametrize(
    ("said", "problem"),
    [
        ("devices", "'devices' has no '='"),
        ("devices=many", "devices must be a number, got 'many'"),
        ("devices=1.5", "devices must be a whole number"),
        ("devices=17", r"devices must be a whole number in 1..16"),
        ("speed=3", "there is no setting speed"),
        ("memory_gib=0", "memory_gib must be > 0"),
        ("link_gb_s=-1", "link_gb_s must be >= 0"),
        ("memory_gib=inf", "memory_gib must be >= 0 and finite"),
        ("/nowhere/machine.yaml", "No such file"),
    ],
)
def test_bad_settings_are_refused(said: str, problem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, said)
    with pytest.raises(BackendUnavailableError, match=problem) as caught:
        from_environment()
    assert "with names among devices, memory_gib" in str(caught.value)
    monkeypatch.setattr(build, "why_not_built", lambda: None)
    assert problem.split(" ", maxsplit=1)[0].strip("'r") in (SimBackend().why_unavailable() or "")


@pytest.mark.parametrize("text", ["[1, 2]", "a: [", "devices: {}"])
def test_bad_files_are_refused(text: str, tmp_path: Path) -> None:
    file = tmp_path / "machine.yml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"machine\.yml|devices must be a number"):
        parse(str(file))


def test_decoded_experts_are_those_of_the_bytes_and_no_more_than_fit() -> None:
    spec = MoeSpec(num_experts=3, hidden_size=64, intermediate_size=32)
    weight_format = BUILT_IN_FORMATS[0]
    packed = []
    for weights in random_layer(spec).values():
        quantized = {
            name: weight_format.quantize(getattr(weights, name)) for name in ("gate", "up", "down")
        }
        packed.append(pack(replace(weights, **quantized), spec, weight_format.descriptor))
    expert_bytes = packed[0].nbytes + 4 * spec.weights_per_expert
    decoded = DecodedExperts(2 * expert_bytes)

    def get(address: int, index: int) -> DecodedExpert:
        return decoded.get(address, packed[index], spec, weight_format.descriptor)

    first = get(0, 0)
    assert get(0, 0) is first
    assert torch.equal(get(0, 1).up, get(64, 1).up), "other bytes came to the same address"
    assert torch.equal(get(0, 0).up, first.up)
    newest = get(128, 2)  # 64 was used longest ago
    assert get(128, 2) is newest
    assert get(0, 0) is get(0, 0)
    assert get(64, 1) is not newest
    assert get(128, 2) is not newest, "a third would be more than fits"
