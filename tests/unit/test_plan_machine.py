"""Machines that are described, and this one as it is measured and remembered."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kt_core.errors import InvalidRequestError, NotEnoughMemoryError
from kt_core.interfaces import ExpertDevice
from kt_core.plan import ExpertLayer, ExpertRates, HostRates, measure
from kt_core.plan.description import Description, machine_of, read_description
from kt_core.plan.machine import described_expert_rates, described_rates
from kt_core.plan.probe import EXTRA_PRODUCTS, HIDDEN, LARGE, large_layers, stack
from kt_core.quant import BUILT_IN_FORMATS
from kt_core.testing import ReferenceBackend
from kt_core.types import MoeSpec

INT8 = next(f for f in BUILT_IN_FORMATS if f.descriptor.name == "int8")
BF16 = next(f for f in BUILT_IN_FORMATS if f.descriptor.name == "bf16")
RATES = described_rates(read_bytes_per_s=100e9, cores=8)
WHOLE = """
host: {memory: 512GiB, bandwidth: 200GB/s, cores: 32, int8: 30TOP/s, bf16: 15TFLOP/s}
accelerator: {count: 2, memory: 24GiB, bandwidth: 1008GB/s, bf16: 165TFLOP/s, link: 31.5GB/s}
"""


def described(tmp_path: Path, text: str) -> Description:
    file = tmp_path / "machine.yaml"
    file.write_text(text, encoding="utf-8")
    return read_description(file)


def never() -> HostRates:
    msg = "measured, although everything was said"
    raise AssertionError(msg)


@pytest.fixture
def device() -> ExpertDevice:
    backend = ReferenceBackend()
    return backend.open(backend.devices()[0].name)


# ---------------------------------------------------------------- described


def test_file_that_says_everything(tmp_path: Path) -> None:
    machine = machine_of(described(tmp_path, WHOLE), never)
    assert machine.memory_bytes == 512 << 30
    assert (machine.cores, machine.host.read_bytes_per_s) == (32, 200e9)
    assert (machine.host.int8_ops_per_s, machine.host.bf16_ops_per_s) == (30e12, 15e12)
    card = machine.card
    assert card is not None
    assert (card.count, card.memory_bytes, card.total_memory_bytes) == (2, 24 << 30, 48 << 30)
    assert (card.read_bytes_per_s, card.ops_per_s, card.link_bytes_per_s) == (
        1008e9,
        165e12,
        31.5e9,
    )
    # What it computes, and what part of its rates is reached.
    assert len(machine.assumptions) == 2


def test_options_override_the_file(tmp_path: Path) -> None:
    file = described(tmp_path, WHOLE)
    machine = machine_of(file.overridden_by(Description(cores=16, card_memory_bytes=0)), never)
    assert (machine.cores, machine.host.read_bytes_per_s, machine.card) == (16, 200e9, None)


def test_what_was_not_said_is_an_assumption() -> None:
    machine = machine_of(
        Description(read_bytes_per_s=200e9, card_memory_bytes=24 << 30, memory_bytes=1 << 39), never
    )
    said = "\n".join(machine.assumptions)
    for word in ("--cores", "AVX-512 VNNI", "1008 GB/s", "165 TFLOP/s", "31.50 GB/s"):
        assert word in said


def test_nothing_said_is_this_machine() -> None:
    machine = machine_of(Description(card_memory_bytes=0), lambda: RATES)
    assert machine.host is RATES
    assert (machine.assumptions, machine.card) == ((), None)


def test_cores_without_bandwidth_are_refused() -> None:
    with pytest.raises(InvalidRequestError, match="--bandwidth 200GB/s"):
        machine_of(Description(cores=32), never)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "must hold host, accelerator, got list"),
        ("gpu: {}", "says gpu, which is not known; known: host, accelerator"),
        ("host: {ram: 1GB}", "says ram, which is not known; known: memory, bandwidth"),
        ("host: {memory: 512}", "memory of host in .* with its unit, such as 24GiB"),
        ("host: {cores: 0}", "cores of host in .* must be a whole number above 0, got 0"),
        ("host: {cores: true}", "must be a whole number above 0, got True"),
        ("host: 3", "host in .* must hold memory, .* got int"),
        ("accelerator: {count: 2}", "must say its memory, such as memory: 24GiB"),
        ("host: {memory: [", "is no YAML"),
        ("", "must hold host, accelerator, got NoneType"),
    ],
)
def test_bad_files(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        described(tmp_path, text)


def test_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="cannot be read: No such file"):
        read_description(tmp_path / "no.yaml")


def test_integers_are_multiplied_by_int8_units() -> None:
    integer = described_expert_rates(RATES, INT8.descriptor)
    floats = described_expert_rates(RATES, BF16.descriptor)
    assert integer.read_bytes_per_s == floats.read_bytes_per_s < RATES.read_bytes_per_s
    assert integer.ops_per_s < RATES.int8_ops_per_s
    assert floats.ops_per_s < RATES.bf16_ops_per_s


def test_rates_are_above_zero() -> None:
    with pytest.raises(ValueError, match="call_s must be above 0, got 0"):
        replace(RATES, call_s=0)


# ---------------------------------------------------------------- measured


def test_measured_once(
    device: ExpertDevice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def measured(device: ExpertDevice, dtype: str) -> HostRates:
        calls.append(dtype)
        return replace(RATES, call_s=1e-6 * len(calls))

    monkeypatch.setattr(measure, "measure_host", measured)
    first = measure.host_rates(device, "bfloat16", tmp_path)
    assert measure.host_rates(device, "bfloat16", tmp_path) == first
    assert calls == ["bfloat16"]
    assert measure.host_rates(device, "float32", tmp_path) != first  # another type, another file
    renewed = measure.host_rates(device, "bfloat16", tmp_path, is_renewed=True)
    assert calls == ["bfloat16", "float32", "bfloat16"]
    assert measure.host_rates(device, "bfloat16", tmp_path) == renewed
    assert {file.suffix for file in (tmp_path / "machine").iterdir()} == {".json"}


@pytest.mark.parametrize("text", ["", "{", "[]", '{"call_s": 1}', '{"call_s": "x"}'])
def test_damaged_results_are_measured_again(
    text: str, device: ExpertDevice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "measure_host", lambda *_: RATES)
    measure.host_rates(device, "bfloat16", tmp_path)
    (file,) = (tmp_path / "machine").iterdir()
    file.write_text(text, encoding="utf-8")
    assert measure.host_rates(device, "bfloat16", tmp_path) == RATES


def test_measuring_needs_memory(device: ExpertDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kt_core.hardware.available_memory_bytes", lambda: 1 << 20)
    with pytest.raises(NotEnoughMemoryError, match="--bandwidth and --cores"):
        measure.measure_host(device, "bfloat16")


def test_this_machine(device: ExpertDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    """All rates come out above 0, which HostRates checks; how large they are is not tested."""
    monkeypatch.setattr(measure, "_DENSE_BYTES", 1 << 20)
    monkeypatch.setattr(measure, "_RUNS", 2)
    monkeypatch.setattr(measure, "_PROBE_DEPTH", 2)
    assert isinstance(measure.measure_host(device, "float32"), HostRates)


def test_experts(device: ExpertDevice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "_EXPERT_BYTES", 1 << 12)
    monkeypatch.setattr(measure, "_EXPERT_SECONDS", 0.0)
    monkeypatch.setattr(measure, "_BATCH", 4)
    spec = MoeSpec(num_experts=8, hidden_size=32, intermediate_size=32)
    layer = ExpertLayer(spec=spec, top_k=2)
    rates = measure.expert_rates(device, BF16, layer, tmp_path)
    assert isinstance(rates, ExpertRates)
    assert rates.read_bytes_per_s > 0
    assert rates.ops_per_s > 0
    assert measure.expert_rates(device, BF16, layer, tmp_path) == rates


def test_probe_differs_by_its_products_alone() -> None:
    large = large_layers(1, torch.float32)
    assert large[0].in_features == LARGE
    hidden = torch.ones((1, 1, HIDDEN))
    with torch.no_grad():
        few = measure._count_calls(stack(large, torch.float32), hidden)
        many = stack(large, torch.float32, extra_products=EXTRA_PRODUCTS)
        assert measure._count_calls(many, hidden)[0] == few[0] + EXTRA_PRODUCTS
        assert few[1] > 20
