"""Every kernel becomes code for every GPU that is promised, with its matrix instructions.

No GPU is needed, and none is used: what is checked is that Triton and the vendors' assemblers take
the kernels, not that they are right (they are interpreted for that) nor how fast they are.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from gpu.kernels import IS_INTERPRETED  # skips where there is no Triton
from kt_core.quant import BUILT_IN_FORMATS
from kt_core.types import ELEMENT_BITS, Element

pytestmark = pytest.mark.skipif(not IS_INTERPRETED, reason="a GPU is here to compile for")

PROGRAM = Path(__file__).with_name("cross_compile.py")
TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942", "gfx950", "gfx1100", "gfx1201")
# Between them every way to decode an element, a scale and an offset, and every kind of grouping.
KINDS = (
    "bf16", "int8", "int8-g16", "int4-g128", "int4-g64-f16-asym", "int4-g32-f32-min", "fp8",
    "mxfp8", "mxfp4", "nvfp4",
)  # fmt: skip
NAMES = [f.descriptor.name for f in BUILT_IN_FORMATS]
# A group of integers that scales its sum is a tile by itself: with 16 or 32 of them, less than 16
# bytes for a thread; with 64 of four bits, where a warp has 64 threads.
SMALL_GROUPS = {
    f.descriptor.name: f.descriptor.group_size * ELEMENT_BITS[f.descriptor.element]
    for f in BUILT_IN_FORMATS
    if f.descriptor.group_size and f.descriptor.element in {Element.INT4, Element.INT8}
} | {"float32": 32 * 4}
BF16 = {"bf16", "activations"}  # the words whose experts are bfloat16
PRODUCTS = {"gate_up", "down", "linear"}
OF_FEW = {"gate_up_few", "down_few", "combine", "linear_few"}
OF_MANY = PRODUCTS | {"plan_blocks", "combine"}


def compile_for(target: str, words: Sequence[str], cache: Path) -> dict[str, list[dict[str, Any]]]:
    """Run the program, with nothing in its cache; return what became of each word's kernels."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache), "PYTHONWARNINGS": "error"}
    environment.pop("TRITON_INTERPRET", None)
    ran = subprocess.run(
        [sys.executable, str(PROGRAM), target, ",".join(words)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-4000:]
    found: dict[str, list[dict[str, Any]]] = {word: [] for word in words}
    for line in ran.stdout.splitlines():
        kernel = json.loads(line)
        found[kernel["word"]].append(kernel)
    return found


def check(target: str, words: Sequence[str], cache: Path) -> None:
    """Compile the calls for few and for many tokens, and look at what became of them."""
    for word, kernels in compile_for(target, words, cache).items():
        few = PRODUCTS | {"combine"} if word in BF16 and target.startswith("sm_") else OF_FEW
        wanted = few - {"linear", "linear_few"} if word == "activations" else few | OF_MANY
        assert {kernel["kernel"] for kernel in kernels} == wanted, word
        for kernel in kernels:
            assert kernel["binary_bytes"] > 0
            limit = kernel["shared_limit_bytes"]
            assert kernel["shared_bytes"] <= limit, f"{kernel} cannot be started"
            if target != "gfx1100":  # it holds operands twice, and spills 2 registers for a format
                assert kernel["spilled_registers"] in {0, None}, f"{kernel} spills"
            is_product = kernel["kernel"] in PRODUCTS
            assert (kernel["matrix_unit"] is not None) == is_product, kernel
            bits = SMALL_GROUPS.get(word, 1024) // (2 if target.startswith("gfx9") else 1)
            if kernel["kernel"].endswith("_few") or (is_product and bits >= 256):
                assert kernel["has_wide_loads"], f"{kernel} reads weights in pieces"


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_one_format(target: str, tmp_path: Path) -> None:
    """One of each vendor, in the default suite."""
    check(target, ["int4-g32"], tmp_path)


@pytest.mark.triton
@pytest.mark.parametrize("target", TARGETS)
def test_every_target(target: str, tmp_path: Path) -> None:
    """Every kind of format; float32 activations, as three bfloat16; every activation, with bias."""
    check(target, [*KINDS, "float32", "activations"], tmp_path)


@pytest.mark.triton
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_every_format(target: str, tmp_path: Path) -> None:
    """The other formats, on one target of each vendor."""
    check(target, [name for name in NAMES if name not in KINDS], tmp_path)
