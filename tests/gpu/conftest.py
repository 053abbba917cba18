"""GPU kernels without a GPU: interpreted here, cross-compiled in a process of its own."""

from __future__ import annotations

import importlib
import os

# Read when Triton's functions are defined, so before anything imports it.
if not os.environ.get("KT_TEST_DEVICE"):
    os.environ.setdefault("TRITON_INTERPRET", "1")

if os.environ.get("KT_EXPECT_TRITON"):  # `nox -s triton`: missing is an error, not a reason to skip
    importlib.import_module("triton")
