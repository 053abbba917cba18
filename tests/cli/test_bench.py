"""``kt bench experts`` on a layer so small that it takes no time; what it says, not how fast."""

from __future__ import annotations

import json
from typing import Any

import pytest

from cli.calling import Kt
from kt_core import hardware
from kt_core.bench import experts
from kt_core.hardware import memory
from kt_core.types import Limits
from kt_cpu.backend import CpuDevice

TINY = ("--hidden", "64", "--intermediate", "32", "--experts", "8", "--top-k", "2", "--layers", "1")
QUICK = ("bench", "experts", *TINY, "--seconds", "0", "--tokens", "1,3")
LIMITS = {"read_gb_per_s", "int8_gop_per_s", "bf16_gflop_per_s"}
ROW = {
    "format",
    "threads",
    "isa",
    "tokens",
    "us_per_layer",
    "gb_per_s",
    "gflop_per_s",
    "rel_error",
    "fraction_of_limit",
}


@pytest.fixture(autouse=True)
def _known_limits(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare every test but one the second that measuring the machine takes before each row."""
    limits = Limits(read_bytes_per_s=1e9, int8_ops_per_s=1e9, bf16_ops_per_s=1e9)
    if request.function is not test_json:
        monkeypatch.setattr(CpuDevice, "measure_limits", lambda device: limits)


def report_of(kt: Kt, *arguments: str) -> dict[str, Any]:
    report = json.loads(kt(*QUICK, "--json", *arguments).succeeds())
    assert list(report) == ["machine", "limits", "results"]
    for row in report["results"]:
        assert set(row) == ROW
        assert all(row[key] > 0 for key in ROW - {"format", "isa"})
        assert row["rel_error"] < 0.05
    return report


def test_json(kt: Kt) -> None:
    report = report_of(kt, "--format", "int4,int8", "--threads", "1")
    assert report["limits"]["int8_gop_per_s"] != 1.0
    assert set(report["limits"]) == LIMITS
    assert all(value > 0 for value in report["limits"].values())
    assert report["machine"]["cpu"]
    rows = [(row["format"], row["threads"], row["tokens"]) for row in report["results"]]
    assert rows == [("int4-g32", 1, 1), ("int4-g32", 1, 3), ("int8", 1, 1), ("int8", 1, 3)]
    backends = json.loads(kt("backends", "--json").succeeds())
    cpu = next(backend for backend in backends if backend["name"] == "cpu")
    assert {row["isa"] for row in report["results"]} == {cpu["devices"][0]["isa"]}


def test_several_numbers_of_threads(kt: Kt) -> None:
    report = report_of(kt, "--format", "bf16", "--threads", "1,2")
    assert [limits["threads"] for limits in report["limits"]] == [1, 2]
    assert all(set(limits) == LIMITS | {"threads"} for limits in report["limits"])
    rows = [(row["threads"], row["tokens"]) for row in report["results"]]
    assert rows == [(1, 1), (1, 3), (2, 1), (2, 3)]


def test_all_formats(kt: Kt) -> None:
    report = report_of(kt, "--format", "all", "--threads", "1", "--tokens", "1")
    backends = json.loads(kt("backends", "--json").succeeds())
    cpu = next(backend for backend in backends if backend["name"] == "cpu")
    assert sorted(row["format"] for row in report["results"]) == cpu["devices"][0]["formats"]
    assert report["limits"] == dict.fromkeys(LIMITS, 1.0)


def test_all_formats_that_have_the_precision(kt: Kt) -> None:
    outcome = kt(*QUICK, "--json", "--format", "all", "--precision", "int8", "--threads", "1")
    formats = {row["format"] for row in json.loads(outcome.succeeds())["results"]}
    assert "int8" in formats
    assert "bf16" not in formats
    assert "left out: format 'bf16' has no int8 activations" in outcome.err


def test_accurate_activations(kt: Kt) -> None:
    errors = {
        precision: report_of(kt, "--format", "int8", "--precision", precision)["results"]
        for precision in ("int8", "bf16", "float32")
    }
    worst = {precision: max(row["rel_error"] for row in rows) for precision, rows in errors.items()}
    assert worst["float32"] <= worst["bf16"] < worst["int8"]


def test_table(kt: Kt) -> None:
    outcome = kt(*QUICK, "--format", "int8", "--threads", "1")
    lines = outcome.succeeds().splitlines()
    assert any(line.startswith("limits, threads 1") and "GB/s read" in line for line in lines)
    header = next(line for line in lines if line.startswith("format"))
    assert header.endswith("tokens  us/layer  GB/s  GFLOP/s  rel. error  of limit")
    assert [line.split()[0] for line in lines[-2:]] == ["int8", "int8"]
    assert all(line.endswith("%") for line in lines[-2:])
    assert "may serve some of them" in outcome.err  # weights of some kilobytes


def test_help(kt: Kt) -> None:
    text = kt("bench", "experts", "--help").succeeds()
    assert "Usage: kt bench experts" in text
    assert "kt bench experts --format all" in text.partition("Examples:")[2]
    assert "float64" in text
    for ugly in ("<bool>", "<str>", "<int>", "<float>", "list[", "{{"):
        assert ugly not in text
    assert "experts" in kt("bench", "--help").succeeds()


@pytest.mark.parametrize(
    ("arguments", "code", "parts"),
    [
        (["--format", "int5"], 1, ["format 'int5' is not registered", "int4-g32"]),
        (["--format", "int4,"], 1, ["format '' is not registered"]),
        (["--top-k", "9"], 2, ["--top-k 9 is more than --experts 8"]),
        (["--tokens", "1,x"], 2, ["--tokens takes whole numbers", "'1,x'"]),
        (["--tokens", "0"], 2, ["--tokens takes whole numbers from 1"]),
        (["--threads", "-1"], 2, ["--threads takes whole numbers"]),
        (["--threads", "100000"], 2, ["--threads takes whole numbers from 1 to 1024"]),
        (["--layers", "many"], 2, ["--layers takes whole numbers", "'many'", "auto"]),
        (["--layers", "1,2"], 2, ["--layers", "'1,2'"]),
        (["--precision", "int9"], 2, ["'--precision'"]),
        (["--hidden", "0"], 2, ["'--hidden'"]),
        (["--seconds", "-1"], 2, ["'--seconds'"]),
        (["--device", "tpu"], 1, ["device 'tpu' is not here", "cpu"]),
        (["--format", "bf16", "--precision", "int8"], 1, ["'bf16' has no int8 activations"]),
    ],
)
def test_bad_input(kt: Kt, arguments: list[str], code: int, parts: list[str]) -> None:
    kt(*QUICK, *arguments).fails(*parts, code=code)


def test_too_large(kt: Kt, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "available_memory_bytes", lambda: 3_000_000_000)
    arguments = ("--hidden", "7168", "--intermediate", "2048", "--experts", "256", "--layers", "2")
    message = kt(*QUICK, *arguments, "--format", "bf16").fails("3.0 GB are free", "--experts")
    assert "2 layers of 256 experts need 4" in message  # 45 GB of weights, and some
    assert memory.available_memory_bytes is not hardware.available_memory_bytes


def test_ctrl_c(kt: Kt, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(experts, "time_layers", interrupted)
    outcome = kt(*QUICK, "--threads", "1")
    assert (outcome.code, outcome.out) == (130, "")
    assert outcome.err.endswith("interrupted\n")
