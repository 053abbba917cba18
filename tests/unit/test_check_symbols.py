"""The check of the ISA objects: what it lets through, and that it notices a leak."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "check_symbols.py"


@pytest.fixture(scope="module")
def check_symbols() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_symbols", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "name",
    [
        "_ZN2kt4avx28kKernelsE",  # kt::avx2::kKernels
        "__odr_asan._ZN2kt4avx28kKernelsE",
        "_ZTVN2kt4avx23FooE",  # vtable for kt::avx2::Foo
        "_ZNK2kt4avx23Foo3BarEv",  # kt::avx2::Foo::Bar() const
        "_ZGVZN2kt4avx23FooEvE5local",  # guard variable for kt::avx2::Foo()::local
    ],
)
def test_own_namespace_is_allowed(check_symbols: ModuleType, name: str) -> None:
    assert check_symbols.foreign_symbols(f"{name} W 0 1a\n", "avx2") == []


@pytest.mark.parametrize(
    "name",
    [
        "_ZNSt6vectorIiSaIiEE17_M_default_appendEm",  # std::vector<int>::_M_default_append
        "_ZNSt6vectorIN2kt4avx21XESaIS2_EE7reserveEm",  # std::vector<kt::avx2::X>::reserve
        "_ZN2kt4avx5128kKernelsE",  # another one's
        "_ZN2kt7RoundUpEmm",  # an inline function of the headers all of them include
        "forward",
    ],
)
def test_everything_else_is_not(check_symbols: ModuleType, name: str) -> None:
    assert check_symbols.foreign_symbols(f"{name} W 0 1a\n", "avx2") == [name]


def compile_for(isa: str, source: str, build_dir: Path) -> None:
    compiler = shutil.which("c++")
    if compiler is None or shutil.which("nm") is None:
        pytest.skip("needs a C++ compiler and nm")
    folder = build_dir / f"kt_isa_{isa}.dir"
    folder.mkdir()
    (folder / "source.cpp").write_text(source)
    command = [compiler, "-O1", "-std=c++20", "-c", "source.cpp", "-o", "source.cpp.o"]
    subprocess.run(command, cwd=folder, check=True)


CLEAN = "namespace kt::%s { extern const int kKernels; const int kKernels = 1; }\n"
LEAKING = """#include <vector>
namespace kt::avx2 { void Grow(std::vector<int>& v) { v.resize(100); } }
"""


def test_a_clean_build_passes(
    check_symbols: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for isa in ("avx2", "scalar"):
        compile_for(isa, CLEAN % isa, tmp_path)

    assert check_symbols.main([str(tmp_path)]) == 0
    assert capsys.readouterr().out == "avx2, scalar: 0 symbols outside their namespace\n"


def test_a_leaking_template_fails(
    check_symbols: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    compile_for("avx2", LEAKING, tmp_path)

    assert check_symbols.main([str(tmp_path)]) == 1
    assert "vector" in capsys.readouterr().err


def test_no_objects_is_a_failure(
    check_symbols: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check_symbols.main([str(tmp_path)]) == 1
    assert "build the extension first" in capsys.readouterr().err
