"""Registers to feature names: recorded processors, the same with changes, and this machine."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from kt_core import _hardware, hardware

SSE = {"ssse3", "sse4_1", "sse4_2", "popcnt"}
AVX2 = SSE | {"bmi1", "bmi2", "avx", "fma", "f16c", "avx2"}
SKYLAKE_X = AVX2 | {"avx512f", "avx512dq", "avx512cd", "avx512bw", "avx512vl"}
# fmt: off
ZEN_4 = SKYLAKE_X | {"avx512ifma", "avx512vbmi", "avx512_vbmi2", "avx512_vnni", "avx512_bitalg",
                     "avx512_vpopcntdq", "avx512_bf16"}
AMX = {"amx_tile", "amx_int8", "amx_bf16"}
GRANITE_RAPIDS = ZEN_4 | {"avx_vnni", "avx512_fp16"} | AMX

# Register values as machines returned them: the first five from the recordings of libcpuid
# (github.com/anrieff/libcpuid, tests/), the last read by kt in a Firecracker guest, Linux 6.18.
# XCR0 is not in those recordings: it is what leaf 13 says the processor can save.
RECORDED: Mapping[str, tuple[dict[str, Any], set[str], str]] = {
    "nehalem": (
        {"leaf0": (0xB, 0x756E6547, 0x6C65746E, 0x49656E69),
         "leaf1": (0x000106A4, 0x03100800, 0x0098E3BD, 0xBFEBFBFF),
         "extended0": (0x80000008, 0, 0, 0),
         "brand": ((0x65746E49, 0x2952286C, 0x726F4320, 0x4D542865),
                   (0x37692029, 0x55504320, 0x20202020, 0x20202020),
                   (0x30323920, 0x20402020, 0x37362E32, 0x007A4847))},
        SSE, "Intel(R) Core(TM) i7 CPU         920  @ 2.67GHz"),
    "haswell": (
        {"leaf0": (0xD, 0x756E6547, 0x6C65746E, 0x49656E69),
         "leaf1": (0x000306C3, 0x03100800, 0x7FDAFBBF, 0xBFEBFBFF),
         "leaf7_0": (0, 0x000027AB, 0, 0), "xcr0": 0x7,
         "extended0": (0x80000008, 0, 0, 0),
         "brand": ((0x65746E49, 0x2952286C, 0x726F4320, 0x4D542865),
                   (0x37692029, 0x3137342D, 0x20514D30, 0x20555043),
                   (0x2E322040, 0x48473035, 0x0000007A, 0))},
        AVX2, "Intel(R) Core(TM) i7-4710MQ CPU @ 2.50GHz"),
    "skylake-x": (
        {"leaf0": (0x16, 0x756E6547, 0x6C65746E, 0x49656E69),
         "leaf1": (0x00050654, 0x0A100800, 0x7FFEFBBF, 0xBFEBFBFF),
         "leaf7_0": (0, 0xD39FFFFB, 0, 0x0C000000), "xcr0": 0xFF,
         "extended0": (0x80000008, 0, 0, 0),
         "brand": ((0x65746E49, 0x2952286C, 0x726F4320, 0x4D542865),
                   (0x37692029, 0x3038372D, 0x43205830, 0x40205550),
                   (0x352E3320, 0x7A484730, 0, 0))},
        SKYLAKE_X, "Intel(R) Core(TM) i7-7800X CPU @ 3.50GHz"),
    "zen 4": (
        {"leaf0": (0x10, 0x68747541, 0x444D4163, 0x69746E65),
         "leaf1": (0x00A60F12, 0x00180800, 0x7EF8320B, 0x178BFBFF),
         "leaf7_0": (1, 0xF1BF97A9, 0x00405FCE, 0x10000010), "leaf7_1": (0x20, 0, 0, 0),
         "xcr0": 0x2E7, "extended0": (0x80000028, 0x68747541, 0x444D4163, 0x69746E65),
         "brand": ((0x20444D41, 0x657A7952, 0x2039206E, 0x30303937),
                   (0x32312058, 0x726F432D, 0x72502065, 0x7365636F),
                   (0x20726F73, 0x20202020, 0x20202020, 0x00202020))},
        ZEN_4, "AMD Ryzen 9 7900X 12-Core Processor"),
    "alder lake": (
        {"leaf0": (0x20, 0x756E6547, 0x6C65746E, 0x49656E69),
         "leaf1": (0x00090672, 0x00800800, 0x7FFAFBFF, 0xBFEBFBFF),
         "leaf7_0": (1, 0x239CA7EB, 0x98C027AC, 0xFC1CC410), "leaf7_1": (0x00400810, 0, 0, 0),
         "xcr0": 0x207, "extended0": (0x80000008, 0, 0, 0),
         "brand": ((0x68743231, 0x6E654720, 0x746E4920, 0x52286C65),
                   (0x6F432029, 0x54286572, 0x6920294D, 0x32312D39),
                   (0x4B303039, 0, 0, 0))},
        AVX2 | {"avx_vnni"}, "12th Gen Intel(R) Core(TM) i9-12900K"),
    "granite rapids": (
        {"leaf0": (0x24, 0x756E6547, 0x6C65746E, 0x49656E69),
         "leaf1": (0x000A0671, 0x00020800, 0xFFFA3203, 0x1F8BFBFF),
         "leaf7_0": (2, 0xF1BF2FFB, 0x1A415F46, 0x23C14010), "leaf7_1": (0x1C30, 0, 0, 0x00084000),
         "xcr0": 0x600E7, "extended0": (0x80000008, 0, 0, 0),
         "brand": ((0x65746E49, 0x2952286C, 0x6F655820, 0x2952286E),
                   (0x6F725020, 0x73736563, 0x0000726F, 0), (0, 0, 0, 0))},
        GRANITE_RAPIDS, "Intel(R) Xeon(R) Processor"),
}
# fmt: on


def features_of(name: str, **changes: object) -> set[str]:
    """Return the features of a recorded processor, some of its registers changed."""
    return set(_hardware.decode_features(_hardware.Registers(**{**RECORDED[name][0], **changes})))


@pytest.mark.parametrize("name", RECORDED)
def test_recorded_processor_is_decoded(name: str) -> None:
    raw, features, brand = RECORDED[name]
    registers = _hardware.Registers(**raw)
    assert set(_hardware.decode_features(registers)) == features
    assert _hardware.brand(registers) == brand
    assert _hardware.vendor(registers) == ("AuthenticAMD" if "zen" in name else "GenuineIntel")


@pytest.mark.parametrize(
    ("xcr0", "expected"),
    [
        (0x600E7, GRANITE_RAPIDS),
        (0x000E7, GRANITE_RAPIDS - AMX),  # Linux before 5.16, and most hypervisors
        (0x200E7, GRANITE_RAPIDS - AMX),  # TILECFG alone
        (0x400E7, GRANITE_RAPIDS - AMX),  # TILEDATA alone
        (0x60007, AVX2 | {"avx_vnni"} | AMX),
        (0x00067, AVX2 | {"avx_vnni"}),  # ZMM16-31 not saved
        (0x00007, AVX2 | {"avx_vnni"}),
        (0x00005, SSE | {"bmi1", "bmi2"}),  # YMM without XMM
        (0x00003, SSE | {"bmi1", "bmi2"}),  # booted with clearcpuid=avx, for one
        (0x000E3, SSE | {"bmi1", "bmi2"}),  # what no processor accepts: ZMM without YMM
        (0x00000, SSE | {"bmi1", "bmi2"}),
    ],
)
def test_feature_needs_its_registers_saved(xcr0: int, expected: set[str]) -> None:
    assert features_of("granite rapids", xcr0=xcr0) == expected


def test_xcr0_counts_only_with_osxsave() -> None:
    eax, ebx, ecx, edx = RECORDED["granite rapids"][0]["leaf1"]
    leaf1 = (eax, ebx, ecx & ~(1 << 27), edx)
    assert features_of("granite rapids", leaf1=leaf1) == SSE | {"bmi1", "bmi2"}


@pytest.mark.parametrize(
    ("leaf", "word", "bit", "gone"),
    [
        ("leaf1", 2, 28, {"avx", "fma", "f16c", "avx2", "avx_vnni"}),
        ("leaf7_0", 1, 16, {name for name in GRANITE_RAPIDS if name.startswith("avx512")}),
        ("leaf7_0", 3, 24, AMX),
        ("leaf7_0", 3, 25, {"amx_int8"}),
        ("leaf7_1", 0, 4, {"avx_vnni"}),
        ("leaf7_1", 0, 5, {"avx512_bf16"}),
    ],
)
def test_masked_feature_takes_along_what_builds_on_it(
    leaf: str, word: int, bit: int, gone: set[str]
) -> None:
    words = list(RECORDED["granite rapids"][0][leaf])
    words[word] &= ~(1 << bit)
    assert features_of("granite rapids", **{leaf: words}) == GRANITE_RAPIDS - gone


def test_leaf_that_does_not_exist_is_not_decoded() -> None:
    ones = (0xFFFFFFFF,) * 4
    vendor = RECORDED["haswell"][0]["leaf0"][1:]
    assert features_of("haswell", leaf7_1=ones) == AVX2  # its leaf 7 has no subleaf 1
    avx_only = SSE | {"avx", "fma", "f16c"}
    assert features_of("haswell", leaf0=(6, *vendor), leaf7_0=ones, leaf7_1=ones) == avx_only
    assert features_of("haswell", leaf0=(0, *vendor)) == set()
    no_brand = {**RECORDED["haswell"][0], "extended0": (0x80000001, 0, 0, 0)}
    assert _hardware.brand(_hardware.Registers(**no_brand)) == ""


def test_brand_is_printable_whatever_a_hypervisor_sets() -> None:
    raw = {
        **RECORDED["haswell"][0],
        "brand": ((0x20202020, 0xFF410A42, 0x20, 0),) + ((0,) * 4,) * 2,
    }
    assert _hardware.brand(_hardware.Registers(**raw)) == "B?A?"


def test_no_registers_mean_no_features() -> None:
    empty = _hardware.Registers()
    assert _hardware.decode_features(empty) == []
    assert (_hardware.vendor(empty), _hardware.brand(empty)) == ("", "")


def test_this_processor_agrees_with_the_kernel() -> None:
    if platform.machine() != "x86_64" or not Path("/proc/cpuinfo").exists():
        pytest.skip("needs x86-64 Linux: the kernel's flags are the reference")
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "flags":
            flags = set(value.split())
            break
    known = set(_hardware.known_features())
    assert set(_hardware.decode_features(_hardware.read_registers())) == flags & known
    assert known >= GRANITE_RAPIDS


def test_amx_permission_is_granted_where_amx_is() -> None:
    has_amx = "amx_tile" in _hardware.decode_features(_hardware.read_registers())
    error = hardware.request_amx_permission()
    assert (error == 0) == has_amx, os.strerror(error)
    assert hardware.amx_permitted() == has_amx
    assert hardware.request_amx_permission() == error  # may be repeated
