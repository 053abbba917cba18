"""Everything that checks this repository: ``nox --list``, and CONTRIBUTING.md for when to run what.

Sessions that need torch share the environment of the session ``env``: it is installed once.
"""

from __future__ import annotations

import os
import platform
import shutil
import zipfile
from pathlib import Path

import nox

nox.needs_version = ">=2025.2.9"  # the first with `requires`
nox.options.sessions = ["lint", "types", "tests", "docs"]
nox.options.reuse_existing_virtualenvs = True
nox.options.default_venv_backend = "virtualenv"  # uv makes environments without pip, which we use

CONSTRAINTS = ("-c", "constraints/cpu.txt", "-c", "constraints/tools.txt")
# Packages that write and read checkpoints: what our readers are compared with.
ORACLES = ("compressed-tensors", "gguf", "hypothesis")
BUILD = Path("build/nox")
PACKAGES = (
    "kt_core", "kt_checkpoints", "kt_cpu", "kt_cuda", "kt_demo", "kt_models", "kt_npu", "kt_rocm",
    "kt_sim", "kt_triton", "kt_xpu",
)  # fmt: skip
QUICK = ("-m", "not slow and not network and not sim and not triton")
# A sanitizer's own memory is no measure of ours.
ASAN_TESTS = ("-k", "not memory", "tests/kernels", "tests/unit/test_hardware_cpuid.py")
# Else `python -c` in a test would import the source tree, which has no compiled extensions.
TEST_ENV = {"PYTHONSAFEPATH": "1"}
# What the kernels of an instruction set need, in the words of /proc/cpuinfo.
AVX512 = {"avx512f", "avx512bw", "avx512dq", "avx512vl"}
ISA_FLAGS = {
    "avx2": {"avx2", "fma", "f16c"},
    "avx_vnni": {"avx2", "fma", "f16c", "avx_vnni"},
    "avx512": AVX512,
    "avx512_vnni": AVX512 | {"avx512_vnni"},
    "avx512_bf16": AVX512 | {"avx512_vnni", "avx512_bf16"},
    "amx": AVX512 | {"avx512_vnni", "avx512_bf16", "amx_tile", "amx_int8", "amx_bf16"},
}


def needs_env(function):
    """Make a session that runs in the environment of ``env``."""
    return nox.session(venv_backend="none", requires=["env"], name=function.__name__)(function)


def program(session: nox.Session, name: str) -> str:
    """Return the path of a program in the environment of ``env``."""
    return str(session.cache_dir.parent / "env" / "bin" / name)


def build_options(session_name: str, **defines: str) -> list[str]:
    """Return what makes pip compile below build/nox, where it does not meet other builds."""
    options = ["-C", f"build-dir={BUILD}/{session_name}/{{wheel_tag}}"]
    for name, value in defines.items():
        options += ["-C", f"cmake.define.{name}={value}"]
    return options


def expected_isas() -> list[str]:
    """Return ``KT_EXPECT_ISAS``, or what Linux says this processor has."""
    if named := os.environ.get("KT_EXPECT_ISAS"):
        return named.split(",")
    flags = cpu_flags()
    return ["scalar", *(isa for isa, needed in ISA_FLAGS.items() if needed <= flags)]


def cpu_flags() -> set[str]:
    """Return the features that Linux reports; none on another processor than x86-64."""
    cpuinfo = Path("/proc/cpuinfo")
    if platform.machine() != "x86_64" or not cpuinfo.is_file():
        return set()
    lines = cpuinfo.read_text(encoding="utf-8").splitlines()
    return set(next((line for line in lines if line.startswith("flags")), "").split())


@nox.session(default=False)
def env(session: nox.Session) -> None:
    """Install kt, with a CPU build of torch, and the tools that must import it."""
    session.install(*CONSTRAINTS, *build_options("env"), ".[plot]", "mypy", "pytest", *ORACLES)


@needs_env
def demo(session: nox.Session) -> None:
    """Ask the demo model something: ``nox -s demo -- "Why is the sky blue?"``."""
    prompt = session.posargs or ["What is the capital of France?", "--temperature", "0"]
    session.run(program(session, "kt"), "run", "demo", *prompt)


@needs_env
def answers(session: nox.Session) -> None:
    """Ask the demo model the same in every format; fetches it first."""
    pytest = (program(session, "pytest"), "-q", "-m", "network")
    session.run(*pytest, *(session.posargs or ["tests/demo/test_answers.py"]), env=TEST_ENV)


@needs_env
def tests(session: nox.Session) -> None:
    """Run the default suite, or what stands behind ``--``."""
    environment = {**TEST_ENV, "KT_EXPECT_ISAS": ",".join(expected_isas())}
    session.run(program(session, "pytest"), *(session.posargs or QUICK), env=environment)


@needs_env
def formats(session: nox.Session) -> None:
    """Read every kind of quantised checkpoint, as others write it; ends with a table."""
    session.run(program(session, "python"), "tests/checkpoints/table.py", env=TEST_ENV)


@nox.session
def lint(session: nox.Session) -> None:
    """Check style, imports, the layout of C++, and what the ISA objects export."""
    session.install(*CONSTRAINTS, "ruff", "import-linter", "clang-format")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("lint-imports", env={"PYTHONPATH": os.pathsep.join([".", "backends", "plugins"])})
    session.run("clang-format", "--dry-run", "-Werror", *cpp_files())
    build_dir = compiled(session)
    session.run("python", "tools/check_symbols.py", build_dir)


def compiled(session: nox.Session, *targets: str, **defines: str) -> str:
    """Compile with CMake alone, everything or some targets; return the build's folder."""
    session.install("cmake", "ninja", "pybind11")
    build_dir = str(BUILD / session.name)
    cmake_dir = session.run("python", "-m", "pybind11", "--cmakedir", silent=True)
    defines |= {
        "pybind11_DIR": str(cmake_dir).strip(),
        "Python_EXECUTABLE": str(Path(session.bin, "python")),
        "KT_WARNINGS_AS_ERRORS": "ON",
    }
    options = [f"-D{name}={value}" for name, value in defines.items()]
    session.run("cmake", "-S", ".", "-B", build_dir, "-G", "Ninja", *options, silent=True)
    chosen = ["--target", *targets] if targets else []
    session.run("cmake", "--build", build_dir, *chosen)
    return build_dir


@nox.session(name="format", default=False)
def format_files(session: nox.Session) -> None:
    """Mend what ``lint`` finds and a tool can mend."""
    session.install(*CONSTRAINTS, "ruff", "clang-format")
    session.run("ruff", "check", "--fix", ".")
    session.run("ruff", "format", ".")
    session.run("clang-format", "-i", *cpp_files())


def cpp_files() -> list[str]:
    """Return every C++ file."""
    folders = map(Path, ("csrc", "backends", "tests/isa", "tests/races"))
    return sorted(str(path) for folder in folders for path in folder.rglob("*.?pp"))


@needs_env
def types(session: nox.Session) -> None:
    """Check the types, strictly."""
    session.run(program(session, "mypy"))
    session.run(program(session, "mypy"), "tools", "bench")


@needs_env
def isa(session: nox.Session) -> None:
    """Run the kernels on every instruction set this machine should have; fail if one is absent.

    Ends with a table: how many cells passed of each format on each instruction set.
    """
    isas = expected_isas()
    session.log("expecting: %s", ", ".join(isas))
    session.run(program(session, "python"), "tools/check_symbols.py", str(BUILD / "env"))
    pytest = (program(session, "pytest"), "-q", *QUICK)
    expect = {**TEST_ENV, "KT_EXPECT_ISAS": ",".join(isas)}
    session.run(*pytest, "tests/kernels", env=expect)
    for name in isas:
        forced = {**expect, "KT_FORCE_ISA": name}
        session.run(*pytest, "tests/contract", "-k", "Cpu", env=forced)
    session.run(program(session, "pytest"), "-q", "-m", "grid", "tests/kernels", env=expect)


@needs_env
def amx(session: nox.Session) -> None:
    """Prove the kernels for AMX and AVX-VNNI on a processor with AVX-512: see tests/isa."""
    if missing := ISA_FLAGS["avx512_bf16"] - cpu_flags():
        session.skip(f"this processor lacks {', '.join(sorted(missing))}")
    target = (BUILD / "amx" / "packages").resolve()
    shutil.rmtree(target, ignore_errors=True)
    defines = build_options("amx", KT_TEST_ISAS="ON", KT_WARNINGS_AS_ERRORS="ON")
    pip = (program(session, "python"), "-m", "pip", "install", "--quiet", "--no-deps")
    session.run(*pip, *defines, "--target", str(target), ".")
    session.run(program(session, "python"), "tools/check_symbols.py", str(BUILD / "amx"))
    pytest = (program(session, "pytest"), "-q", *QUICK)
    environment = {**TEST_ENV, "PYTHONPATH": str(target)}
    session.run(*pytest, *(session.posargs or ["tests/isa"]), env=environment)
    if not session.posargs:  # and what every instruction set must pass
        session.run(*pytest, "tests/kernels", "-k", "amx or vnni", env=environment)


@needs_env
def asan(session: nox.Session) -> None:
    """Run kernels and runtime under AddressSanitizer and UndefinedBehaviorSanitizer."""
    compiler = os.environ.get("CXX", "c++")
    libraries = []
    # libstdc++ too: else the sanitizer looks for __cxa_throw before it is loaded.
    for library in ("libasan.so", "libubsan.so", "libstdc++.so"):
        path = session.run(compiler, f"-print-file-name={library}", silent=True, external=True)
        libraries.append(str(path).strip())
    target = (BUILD / "asan" / "packages").resolve()
    shutil.rmtree(target, ignore_errors=True)
    sanitize = build_options("asan", KT_SANITIZE="address,undefined", KT_TEST_RACES="ON")
    pip = (program(session, "python"), "-m", "pip", "install", "--quiet", "--no-deps")
    session.run(*pip, *sanitize, "--target", str(target), ".")
    # Little is inlined at -O1, so this sees what -O3 may hide.
    session.run(program(session, "python"), "tools/check_symbols.py", str(BUILD / "asan"))
    environment = {
        **TEST_ENV,
        "ASAN_OPTIONS": "detect_leaks=0:strict_string_checks=1",
        "LD_PRELOAD": os.pathsep.join(libraries),
        "PYTHONPATH": str(target),
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    # --capture=sys: a sanitizer writes its report and ends the process.
    pytest = (program(session, "pytest"), "-q", "--capture=sys")
    session.run(*pytest, *(session.posargs or ASAN_TESTS), env=environment)
    # What no Python takes part in, with leaks: calls that streams start, experts that move.
    programs = (BUILD / "asan").glob("*/tests/races/kt_races")
    races = str(max(programs, key=lambda file: file.stat().st_mtime))
    session.run(races, external=True, env={"UBSAN_OPTIONS": "print_stacktrace=1"})


@nox.session(default=False)
def tsan(session: nox.Session) -> None:
    """Run the runtime under ThreadSanitizer, which must find the races of ``kt_races planted``.

    In a program without Python and torch, whose threads it could not see into: tests/races.
    """
    build_dir = compiled(session, "kt_races", KT_SANITIZE="thread", KT_TEST_RACES="ON")
    races = str(Path(build_dir, "tests/races/kt_races"))
    session.run(races, *session.posargs, external=True, env={"TSAN_OPTIONS": "exitcode=66"})
    found = session.run(
        *(races, "planted"),
        external=True,
        silent=True,
        success_codes=[66],
        env={"TSAN_OPTIONS": "exitcode=66"},
    )
    for name in ("ExpertLayer::LoadPacked", "StreamCall::StartJob"):
        if name not in str(found):
            session.error(f"ThreadSanitizer did not see the race in {name}")


@needs_env
def sim(session: nox.Session) -> None:
    """Compile the simulated device and run what needs it: docs/simulated-device.md."""
    python = program(session, "python")
    session.run(python, "-m", "pip", "install", "--quiet", *CONSTRAINTS, "ninja")
    # torch looks for ninja in the path.
    path = os.pathsep.join([str(Path(python).parent), os.environ["PATH"]])
    session.run(python, "-m", "kt_sim", env={**TEST_ENV, "PATH": path})
    pytest = (program(session, "pytest"), "-q", "-m", "sim")
    session.run(*pytest, *(session.posargs or ["tests/sim"]), env=TEST_ENV)


@needs_env
def triton(session: nox.Session) -> None:
    """Interpret every GPU kernel against the reference, and compile each for eight GPUs."""
    python = program(session, "python")
    # Alone: whoever has a GPU has the Triton that torch asked for.
    session.run(python, "-m", "pip", "install", "--quiet", "--no-deps", *CONSTRAINTS, "triton")
    pytest = (program(session, "pytest"), "-q")
    expect = {**TEST_ENV, "KT_EXPECT_TRITON": "1"}
    session.run(*pytest, *(session.posargs or ["tests/gpu"]), env=expect)


@needs_env
def families(session: nox.Session) -> None:
    """Compare every MoE family of the installed transformers with its own experts."""
    BUILD.mkdir(parents=True, exist_ok=True)
    outputs = ["--json", str(BUILD / "families.json"), "--markdown", "docs/families.md"]
    outputs += ["--status", "plugins/kt_models/families.json"]
    arguments = session.posargs or ["--minimum", "55", *outputs]
    session.run(program(session, "python"), "tests/models/families.py", *arguments)


@needs_env
def outside(session: nox.Session) -> None:
    """Install a plug-in from outside this repository beside kt, and use it."""
    # On a busy machine, compiling takes longer than a test may.
    pytest = (program(session, "pytest"), "-o", "faulthandler_timeout=3600")
    slow = (*pytest, "-m", "slow and not network and not grid")
    session.run(*slow, *session.posargs, env=TEST_ENV)


@needs_env
def bench(session: nox.Session) -> None:
    """Measure the kernels: ``nox -s bench -- --format all --threads 1,2``."""
    session.run(program(session, "kt"), "bench", "experts", *session.posargs)


@needs_env
def memory(session: nox.Session) -> None:
    """Measure what loading takes: see bench/load_memory.py."""
    session.run(program(session, "python"), "bench/load_memory.py", *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation; a broken link or include fails."""
    # ruff formats the signatures
    session.install(*CONSTRAINTS, "mkdocs-material", "mkdocstrings-python", "ruff")
    quiet = {"NO_MKDOCS_2_WARNING": "1"}
    session.run("mkdocs", "build", "--strict", "--site-dir", str(BUILD / "site"), env=quiet)


@needs_env
def build(session: nox.Session) -> None:
    """Build the source distribution, a wheel from it, and check that the wheel works."""
    python = program(session, "python")
    output = (BUILD / "dist").resolve()
    shutil.rmtree(output, ignore_errors=True)
    session.run(python, "-m", "pip", "install", "--quiet", *CONSTRAINTS, "build")
    session.run(python, "-m", "build", "--outdir", str(output))
    (wheel,) = output.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    wanted = [f"{package}/__init__.py" for package in PACKAGES]
    wanted += [f"{package}/py.typed" for package in PACKAGES]
    missing = [name for name in wanted if name not in names]
    for extension in ("kt_core/_hardware.", "kt_cpu/_kernels."):
        if not any(name.startswith(extension) and name.endswith(".so") for name in names):
            missing.append(f"{extension}*.so")
    strange = [name for name in names if not name.startswith((*PACKAGES, "kt_core-"))]
    if missing or strange:
        session.error(f"{wheel.name} lacks {missing} and should not hold {strange}")
    target = output / "installed"
    pip = (python, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target))
    session.run(*pip, str(wheel))
    # `doctor` loads both extensions; it exits with 1 if the cpu backend cannot run.
    environment = {**TEST_ENV, "PYTHONPATH": str(target)}
    session.run(python, "-m", "kt_core.cli", "doctor", env=environment)


@nox.session(default=False)
def changelog(session: nox.Session) -> None:
    """Show the next entry of CHANGELOG.md, made from the fragments in changelog/."""
    session.install(*CONSTRAINTS, "towncrier")
    session.run("towncrier", *(session.posargs or ["build", "--draft", "--version", "unreleased"]))
