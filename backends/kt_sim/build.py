"""Compiles the device, on demand: ``python -m kt_sim``. Needs torch's headers and a compiler.

It is not part of the wheel, which would then be tied to one version of torch. What is compiled lies
below ``$XDG_CACHE_HOME/kt/sim``, in a folder named after everything it was made from.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from kt_core.errors import BackendUnavailableError
from kt_core.paths import cache_dir

NAME = "kt_sim_device"
COMMAND = "python -m kt_sim"
_SOURCES = Path(__file__).parent / "csrc"
_STEP = re.compile(r"\[(\d+)/(\d+)\]")
_FLAGS = ("-O1", "-fvisibility=hidden")
# The first with all that is used: graphs, and native handles of streams, of any device type.
_OLDEST_TORCH = (2, 13)


def library_path() -> Path:
    """Return where the compiled device lies, or would lie. Imports and runs nothing."""
    key = hashlib.sha256()
    for source in sorted(_SOURCES.iterdir()):
        key.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    key.update(repr((_torch_version(), sysconfig.get_config_var("SOABI"), _FLAGS)).encode())
    return cache_dir() / "sim" / key.hexdigest()[:16] / f"{NAME}.so"


def why_not_built() -> str | None:
    """Return None if the device is compiled, else what to do. Fast, and compiles nothing."""
    if not sys.platform.startswith("linux"):
        return f"it is written for Linux, and this is {sys.platform}"
    if library_path().is_file():
        return None
    return why_not_buildable() or (
        f"it is compiled on demand, and was not yet for torch {_torch_version()}: run `{COMMAND}`, "
        f"which takes some minutes"
    )


def why_not_buildable() -> str | None:
    """Return None if the device could be compiled here, else what is missing and how to get it."""
    version = _torch_version()
    if tuple(int(part) for part in version.split(".")[:2]) < _OLDEST_TORCH:
        oldest = ".".join(map(str, _OLDEST_TORCH))
        return f"it needs torch {oldest} or newer, and this is {version}: pip install -U torch"
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        return (
            f"no C++ compiler {compiler!r} is found, and it is compiled on demand: install one "
            f"with C++20 (on Debian: apt install g++), or name one in CXX"
        )
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file():
        return (
            "Python's headers are missing, and it is compiled on demand: install them (on Debian: "
            "apt install python3-dev)"
        )
    if shutil.which("ninja") is None:
        return "it is compiled with ninja, which is missing: pip install 'kt-core[sim]'"
    return None


def build(on_progress: Callable[[int, int], None] | None = None) -> Path:
    """Compile the device unless it is there already; returns its path.

    Several processes may ask at once: the others wait for the first.

    Args:
        on_progress: Called with how many files are compiled, of how many.

    Raises:
        BackendUnavailableError: Something is missing, or the compiler failed.
    """
    target = library_path()
    if target.is_file():
        return target
    if why := why_not_buildable():
        msg = f"the simulated device cannot be compiled: {why}"
        raise BackendUnavailableError(msg)
    target.parent.parent.mkdir(parents=True, exist_ok=True)
    with _alone(target.parent.parent / "lock"):
        if target.is_file():
            return target
        with tempfile.TemporaryDirectory(dir=target.parent.parent) as folder:
            _compile(Path(folder), on_progress)
            target.parent.mkdir(exist_ok=True)
            (Path(folder) / target.name).replace(target)
    return target


def _compile(folder: Path, on_progress: Callable[[int, int], None] | None) -> None:
    """Run torch's builder in a process of its own: it prints, and changes what it is run in."""
    sources = sorted(str(path) for path in _SOURCES.glob("*.cpp"))
    program = (
        "import sys\n"
        "from torch.utils.cpp_extension import load\n"
        "name, folder, flags, *sources = sys.argv[1:]\n"
        "load(name, sources, extra_cflags=flags.split(), build_directory=folder, verbose=True,\n"
        "     is_python_module=False)\n"
    )
    arguments = [NAME, str(folder), " ".join(_FLAGS), *sources]
    command = [sys.executable, "-P", "-c", program, *arguments]
    said = []
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            said.append(line.rstrip())
            if on_progress is not None and (step := _STEP.match(line)):
                on_progress(int(step[1]), int(step[2]))
    if process.returncode != 0:
        errors = [line for line in said if "error" in line.lower()]
        shown = "\n".join(errors[:20] or said[-20:])
        msg = (
            f"the simulated device does not compile with torch {_torch_version()} and "
            f"{os.environ.get('CXX', 'c++')}:\n{shown}\nIt is known to with GCC 12 and torch 2.13; "
            f"CXX chooses another compiler"
        )
        raise BackendUnavailableError(msg)


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield  # closing the file unlocks it


def _torch_version() -> str:
    return importlib.metadata.version("torch")
