"""``kt plan``, mostly on a described machine, where nothing has to be measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cli.calling import STORIES, Kt
from kt_core.plan import ExpertRates, HostRates, measure

MACHINE = ("--ram", "8GiB", "--bandwidth", "50GB/s", "--cores", "4")
CARD = ("--vram", "4GiB")
KEYS = {
    "model", "model_type", "parameters", "format", "dense_format", "dense_dtype", "fits",
    "total_weight_bytes", "weight_bytes_by_part", "saved_by_dense_format_bytes", "bytes_by_tier",
    "capacity_by_tier", "missing_by_tier", "context", "max_context", "kv_cache_bytes_by_context",
    "num_experts", "hot_experts", "hot_fraction", "prompt_tokens", "decode_tokens_per_s",
    "prefill_tokens_per_s", "decode_s", "prefill_s", "fine_tuning", "machine", "assumptions",
    "advice",
}  # fmt: skip


def report_of(kt: Kt, *arguments: str) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(kt("plan", str(STORIES), *arguments, "--json").succeeds())
    assert set(report) == KEYS
    return report


def test_json(kt: Kt) -> None:
    report = report_of(kt, *MACHINE)
    assert report["fits"] is True
    assert report["format"] == "bf16"
    host = report["bytes_by_tier"]["host"]
    assert report["total_weight_bytes"] == host["expert_weights"] + host["dense_weights"]
    assert report["total_weight_bytes"] == sum(report["weight_bytes_by_part"].values())
    assert report["decode_tokens_per_s"] > 0
    assert report["prefill_tokens_per_s"] > report["decode_tokens_per_s"]
    assert report["capacity_by_tier"] == {"host": 8 << 30}
    assert report["hot_experts"] == 0
    assert report["machine"]["accelerator"] is None


def test_table(kt: Kt) -> None:
    text = kt("plan", str(STORIES), *MACHINE).succeeds()
    for words in ("fits             yes", "expert weights", "tokens/s after a prompt", "advice"):
        assert words in text


def test_accelerator(kt: Kt) -> None:
    report = report_of(kt, *MACHINE, "--vram", "4GiB", "--pcie", "16GB/s")
    assert report["hot_experts"] == report["num_experts"]
    assert report["bytes_by_tier"]["host"]["expert_weights"] == 0
    assert report["machine"]["accelerator"]["link_bytes_per_s"] == 16e9
    assert any("1008 GB/s" in sentence for sentence in report["assumptions"])
    fewer = report_of(kt, *MACHINE, "--vram", "4GiB", "--hot-experts", "3")
    assert fewer["hot_experts"] == 3


def test_machine_file(kt: Kt, tmp_path: Path) -> None:
    file = tmp_path / "machine.yaml"
    file.write_text("host: {memory: 8GiB, bandwidth: 50GB/s, cores: 4}", encoding="utf-8")
    assert report_of(kt, "--machine", str(file)) == report_of(kt, *MACHINE)


def test_model_that_does_not_fit(kt: Kt) -> None:
    outcome = kt("plan", str(STORIES), "--ram", "100MB", *MACHINE[2:], "--json")
    assert outcome.code == 1
    report = json.loads(outcome.out)
    assert report["fits"] is False
    assert report["missing_by_tier"]["host"] > 0
    assert "error: " in outcome.err
    assert "host memory lacks" in outcome.err
    assert "of host memory (--ram)" in outcome.err


def test_what_would_fit_is_true(kt: Kt) -> None:
    sizes = {
        name: sum(report_of(kt, *MACHINE, "--format", name)["bytes_by_tier"]["host"].values())
        for name in ("bf16", "int4")
    }
    room = f"{(sizes['bf16'] + sizes['int4']) // 2}B"
    outcome = kt("plan", str(STORIES), *MACHINE, "--format", "bf16", "--ram", room)
    assert outcome.code == 1
    assert "it fits with --format int4-g32" in outcome.err
    assert kt("plan", str(STORIES), *MACHINE, "--format", "int4", "--ram", room).code == 0
    assert report_of(kt, *MACHINE, "--ram", room)["format"] != "bf16"  # auto finds it


def test_a_packed_model(kt: Kt, tmp_path: Path) -> None:
    """It is what it is: experts, and dense layers."""
    target = tmp_path / "packed"
    options = ("--format", "int4", "--dense-format", "int8", "--method", "rtn", "--threads", 1)
    kt("quant", STORIES, target, *options).succeeds()
    packed = json.loads(kt("plan", target, *MACHINE, "--json").succeeds())
    assert (packed["format"], packed["dense_format"]) == ("int4-g32", "int8")
    same = report_of(kt, *MACHINE, "--format", "int4", "--dense-format", "int8")
    assert packed["total_weight_bytes"] == same["total_weight_bytes"]
    on_card = json.loads(kt("plan", target, *MACHINE, *CARD, "--json").succeeds())
    assert on_card["dense_format"] == "int8"
    dense = on_card["bytes_by_tier"]["accelerator"]["dense_weights"]
    assert dense == packed["bytes_by_tier"]["host"]["dense_weights"]
    kt("plan", target, *MACHINE, "--dense-format", "int4").fails("packed as int8, not int4")
    kt("plan", target, *MACHINE, "--format", "int8").fails("packed as int4-g32, not int8")


def test_an_accelerator_that_is_too_small_may_hold_packed_layers(kt: Kt) -> None:
    """`auto` packs them before it gives up."""
    plain = report_of(kt, *MACHINE, *CARD)
    assert plain["dense_format"] == "none"
    tier = plain["bytes_by_tier"]["accelerator"]
    room = sum(tier.values()) - tier["expert_weights"] - 1
    packed = report_of(kt, *MACHINE, "--vram", f"{room}B")
    assert packed["dense_format"] == "int8"
    assert packed["bytes_by_tier"]["accelerator"]["dense_weights"] < tier["dense_weights"]


def test_an_accelerator_that_computes_no_dense_layers(
    kt: Kt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `kt run` refuses a format there; so `auto` takes none, and packed ones are unpacked."""
    monkeypatch.setattr("kt_core.cli.plan._leaves_dense", lambda *_: True)
    arguments = ("plan", STORIES, *MACHINE, *CARD, "--dense-format", "int8")
    kt(*arguments).fails("on this accelerator torch computes dense layers")
    too_small = kt("plan", STORIES, *MACHINE, "--vram", "801MB", "--json")
    assert too_small.code == 1
    assert json.loads(too_small.out)["dense_format"] == "none"
    assert "--dense-format" not in too_small.err
    assert kt("plan", STORIES, *MACHINE, "--vram", "0", "--dense-format", "int8").code == 0

    target = tmp_path / "packed"
    options = ("--format", "int4", "--dense-format", "int8", "--method", "rtn", "--threads", 1)
    kt("quant", STORIES, target, *options).succeeds()
    unpacked = report_of(kt, *MACHINE, *CARD)["bytes_by_tier"]["accelerator"]["dense_weights"]
    unpacked += 2 * 1024 * 128  # the head has a weight of its own, which was the embedding
    report = json.loads(kt("plan", target, *MACHINE, *CARD, "--json").succeeds())
    assert report["dense_format"] == "none"
    assert report["bytes_by_tier"]["accelerator"]["dense_weights"] == unpacked


def test_dense_layers(kt: Kt) -> None:
    plain = report_of(kt, *MACHINE, "--dense-format", "none")
    packed = report_of(kt, *MACHINE, "--dense-format", "int8")
    saved = packed["saved_by_dense_format_bytes"]
    assert saved > 0
    assert plain["total_weight_bytes"] - packed["total_weight_bytes"] == saved


def test_released_model_by_name(kt: Kt) -> None:
    outcome = kt("plan", "gpt-oss-20b", *MACHINE, "--ram", "24GiB", "--json")
    report = json.loads(outcome.succeeds())
    assert report["parameters"] == 20_914_757_184
    assert report["num_experts"] == 24 * 32


def test_this_machine_is_measured_once(kt: Kt, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    rates = HostRates(**dict.fromkeys(HostRates.__dataclass_fields__, 1e9))

    def host(*arguments: Any) -> HostRates:
        calls.append("host")
        return rates

    def experts(device: Any, weight_format: Any, layer: Any) -> ExpertRates:
        calls.append(weight_format.descriptor.name)
        return ExpertRates(read_bytes_per_s=1e9, ops_per_s=1e9)

    monkeypatch.setattr(measure, "measure_host", host)
    monkeypatch.setattr(measure, "measure_experts", experts)
    first = report_of(kt, "--vram", "0")
    assert calls == ["host", "bf16", "int8", "int4-g32"]
    second = report_of(kt, "--vram", "0")
    assert calls == ["host", "bf16", "int8", "int4-g32"]
    assert first["decode_tokens_per_s"] == second["decode_tokens_per_s"]
    report_of(kt, "--vram", "0", "--remeasure")
    assert calls.count("host") == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--ram", "24"), "--ram must be a number with its unit, such as 24GiB or 24GB, got '24'"),
        (("--cores", "4"), "--bandwidth, such as --bandwidth 200GB/s"),
        (("--bandwidth", "fast"), "--bandwidth must be a number with its unit"),
        (("--vram", "0", "--pcie", "16GB/s"), "--vram 0 is a machine without one"),
        (("--prompt", "99", "--context", "9"), "--prompt 99 does not fit into a context of 9"),
        (("--context", "99999999"), "is more than the model was made for"),
        (("--plot", "plan.pdf"), "--plot writes .png and .svg"),
        (("--machine", "no.yaml"), "--machine no.yaml cannot be read"),
    ],
)
def test_bad_arguments(kt: Kt, arguments: tuple[str, ...], message: str) -> None:
    outcome = kt("plan", str(STORIES), *arguments)
    assert outcome.code == 2
    assert message in outcome.err
    assert outcome.out == ""


@pytest.mark.parametrize("option", ["--format", "--dense-format"])
def test_unknown_formats(kt: Kt, option: str) -> None:
    kt("plan", str(STORIES), *MACHINE, option, "int3").fails("format 'int3' is not registered")


def test_plot(kt: Kt, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")
    file = tmp_path / "plan.svg"
    outcome = kt("plan", str(STORIES), *MACHINE, "--vram", "4GiB", "--plot", str(file))
    outcome.succeeds()
    assert f"wrote {file}" in outcome.err
    assert "share of experts on the accelerator" in file.read_text(encoding="utf-8")
