"""Host functions through a symbol of a loaded library, with a runtime of eight lines."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from kt_core.errors import DeviceError
from kt_core.hardware.runtime_library import RuntimeHostFunctions

SYMBOL = "kt_test_launch_host_function"
SOURCE = f"""
int last_stream;
int {SYMBOL}(void* stream, void (*function)(void*), void* argument) {{
  last_stream = (int)(unsigned long)stream;
  if (last_stream == 13) return 13;
  function(argument);
  return 0;
}}
"""
CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


@dataclass
class Stream:
    """What of ``torch.Stream`` is used: there is no device here whose stream it could be."""

    native_handle: int
    device: str = "cpu"


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("there is no C compiler to make a runtime with")
    folder = tmp_path_factory.mktemp("runtime")
    source, target = folder / "runtime.c", folder / "libktfakert.so.1"
    source.write_text(SOURCE, encoding="utf-8")
    subprocess.run([*compiler.split(), "-shared", "-fPIC", source, "-o", target], check=True)
    return target


def launch(functions: RuntimeHostFunctions, stream: int) -> list[tuple[int, int]]:
    """Return what the host function got, and on which thread."""
    calls: list[tuple[int, int]] = []
    callback = CALLBACK(lambda argument: calls.append((argument, threading.get_ident())))
    address = ctypes.cast(callback, ctypes.c_void_p).value
    assert address is not None
    handle: Any = Stream(stream)
    functions.launch(handle, address, 42)
    return calls


def test_a_library_that_nobody_loaded_is_not_loaded(library: Path) -> None:
    with pytest.raises(DeviceError, match=rf"{SYMBOL} is in none.*{library.name}.*kt doctor"):
        RuntimeHostFunctions(SYMBOL, [str(library)])
    assert library.name not in Path("/proc/self/maps").read_text(encoding="utf-8")


def test_a_loaded_library_is_found_and_called(library: Path) -> None:
    loaded = ctypes.CDLL(str(library), mode=os.RTLD_LOCAL)  # as torch loads its own
    functions = RuntimeHostFunctions(SYMBOL, ["libktfakert.so.2", str(library)])
    assert launch(functions, 7) == [(42, threading.get_ident())]
    assert ctypes.c_int.in_dll(loaded, "last_stream").value == 7


def test_a_refusal_is_an_error_with_the_code_and_its_meaning(library: Path) -> None:
    ctypes.CDLL(str(library))
    with pytest.raises(DeviceError, match=rf"{SYMBOL} refused .*: code 13;"):
        launch(RuntimeHostFunctions(SYMBOL, [str(library)]), 13)
    names = RuntimeHostFunctions(SYMBOL, [str(library)], describe=lambda code: f"number {code}")
    with pytest.raises(DeviceError, match=r"code 13 \(number 13\)"):
        launch(names, 13)


def test_symbols_of_the_process_come_first() -> None:
    # Some C library function of another shape: found, never called.
    assert RuntimeHostFunctions("getpid", []).symbol == "getpid"
