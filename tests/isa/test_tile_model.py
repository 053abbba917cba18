"""What emulates AMX refuses what the processor would, and sees what GCC 12 does without fences."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from kt_core import hardware

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
COMPILER = os.environ.get("CXX") or shutil.which("c++")
LANES = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni", "-mavx512bf16"]
TILES = ["-mamx-tile", "-mamx-int8", "-mamx-bf16"]
FLAGS = ["-std=c++20", "-O2", "-pthread", "-mfma", *LANES, *TILES]
SOURCES = [HERE / "faults.cpp", HERE / "amx_trap.cpp"]

Run = Callable[..., "subprocess.CompletedProcess[str]"]


def why_not() -> str | None:
    features = hardware.detect(with_accelerators=False).cpu.features
    if platform.machine() != "x86_64" or not {"avx512_bf16", "avx512_vnni"} <= features:
        return "needs AVX-512 with VNNI and BF16"
    if "amx_tile" in features:
        return "this processor has AMX: nothing is emulated"
    return None if COMPILER else "needs a C++ compiler: set CXX"


pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("faults")
    for name, extra in (("fenced", []), ("unfenced", ["-DNO_FENCE"])):
        command = [COMPILER, *FLAGS, *extra, f"-I{ROOT / 'csrc'}", f"-I{HERE}"]
        subprocess.run([*command, *SOURCES, "-o", folder / name], check=True)

    def start(program: str, use: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([folder / program, use], capture_output=True, text=True, check=False)

    return start


def drops_stores() -> bool:
    """Say whether this compiler is one of which it is known that it needs the fences."""
    macros = subprocess.run(
        [str(COMPILER), "-dM", "-E", "-x", "c++", os.devnull],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    return "#define __GNUC__ 12" in macros and not any("__clang__" in line for line in macros)


def test_with_fences_all_is_well(run: Run) -> None:
    assert run("fenced", "config").returncode == 0
    assert run("fenced", "data").stdout == "0 wrong\n"


@pytest.mark.parametrize(
    ("use", "fault"),
    [
        ("thread", "AMX fault: this thread's tiles are not configured\n"),
        ("shape", "AMX fault: the shapes of a product's tiles do not match\n"),
    ],
)
def test_what_the_processor_refuses_ends_the_process(run: Run, use: str, fault: str) -> None:
    done = run("fenced", use)
    assert done.returncode < 0
    assert done.stderr == fault


def test_stores_dropped_for_want_of_a_fence_are_noticed(run: Run) -> None:
    if not drops_stores():
        pytest.skip("only GCC 12 is known to drop them")
    config, data = run("unfenced", "config"), run("unfenced", "data")
    assert config.returncode < 0
    assert config.stderr.startswith("AMX fault: ")
    assert data.returncode == 0
    assert data.stdout != "0 wrong\n"
