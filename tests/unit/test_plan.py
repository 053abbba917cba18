"""The arithmetic of ``kt plan``, on a model small enough to count by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from kt_core.errors import InvalidRequestError, NotEnoughMemoryError, UnsupportedFormatError
from kt_core.plan import (
    CacheLayer,
    Card,
    DenseWork,
    ExpertLayer,
    ExpertRates,
    Formats,
    HostRates,
    LinearLayers,
    Machine,
    ModelOutline,
    Plan,
    Planner,
    Wish,
    advise,
    training_memory,
)
from kt_core.plan import planner as planner_module
from kt_core.plan.fitting import RESERVE_BYTES, first_that_fits, format_names
from kt_core.plan.plot import check_plot, context_curves, draw, hot_curves
from kt_core.plan.roofline import decode_times, prefill_times
from kt_core.plan.units import gigabytes, parse_bytes, parse_bytes_per_s, parse_ops_per_s
from kt_core.types import Element, Format, LinearSpec, MoeSpec, ScaleType

BF16 = Format(name="bf16", element=Element.BF16)
INT8 = Format(name="int8", element=Element.INT8, scale=ScaleType.FLOAT32)
SPEC = MoeSpec(num_experts=8, hidden_size=1000, intermediate_size=100)  # 300,000 weights an expert
LINEAR = LinearSpec(in_features=400, out_features=500)
WORK = DenseWork(
    token_flops=2e6, pair_flops=0.0, attention_flops=0.0, attention_bytes=0.0, token_bytes=0.0,
    pair_bytes=0.0, threaded_calls=10, other_calls=100,
)  # fmt: skip
OUTLINE = ModelOutline(
    model_type="toy",
    parameters=5_800_000,
    dense_dtype="bfloat16",
    dense_bytes={"embeddings": 200_000, "attention_and_dense_layers": 800_000},
    decode_read_bytes=800_000,
    linears=(LinearLayers(spec=LINEAR, count=2, element_bytes=2),),
    expert_layers=(ExpertLayer(spec=SPEC, top_k=2), ExpertLayer(spec=SPEC, top_k=2)),
    cache=(CacheLayer(fixed_bytes=0, token_bytes=100, late_fixed_bytes=0, late_token_bytes=100),),
    decode=WORK,
    prefill=WORK,
    max_context=1000,
    num_layers=2,
    hidden_size=1000,
    vocab_size=100,
)
HOST = HostRates(
    read_bytes_per_s=10e9, int8_ops_per_s=1e12, bf16_ops_per_s=5e11, dense_read_bytes_per_s=8e9,
    dense_ops_per_s=4e11, attention_read_bytes_per_s=1e9, attention_ops_per_s=1e11,
    threaded_call_s=1e-5, call_s=1e-6, expert_call_s=2e-5,
)  # fmt: skip
RATES = ExpertRates(read_bytes_per_s=9e9, ops_per_s=3e11)
WISH = Wish(context=100, prompt=50)


def expert_bytes(spec: MoeSpec, weight_format: Format) -> int:
    return spec.weights_per_expert * (2 if weight_format is BF16 else 1)


def planner(memory: int = 1 << 40, card: Card | None = None) -> Planner:
    return Planner(
        outline=OUTLINE,
        machine=Machine(memory_bytes=memory, cores=4, host=HOST, card=card),
        expert_bytes=expert_bytes,
        expert_rates=lambda _: RATES,
    )


# ---------------------------------------------------------------- units


@pytest.mark.parametrize(
    ("text", "size"),
    [("24GiB", 24 << 30), ("24GB", 24 * 10**9), ("1.5 TiB", 3 << 39), ("7B", 7), ("2kB", 2000)],
)
def test_bytes(text: str, size: int) -> None:
    assert parse_bytes(text, "--ram") == size


@pytest.mark.parametrize(
    "text", ["24", "24G", "24GIB", "GiB", "-1GB", "0GB", "1e9B", "24GB/s", "", "24 GiB x", "nanGB"]
)
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(InvalidRequestError, match=r"^--ram must be"):
        parse_bytes(text, "--ram")


def test_rates() -> None:
    assert parse_bytes_per_s("200GB/s", "--bandwidth") == 200e9
    assert parse_ops_per_s("165TFLOP/s", "bf16") == 165e12
    assert parse_ops_per_s("30TOPS", "int8") == 30e12
    with pytest.raises(InvalidRequestError, match=r"--bandwidth .* such as 200GB/s, got '200GB'"):
        parse_bytes_per_s("200GB", "--bandwidth")


def test_sizes_for_people() -> None:
    assert (gigabytes(1_234_000_000), gigabytes(368e9)) == ("1.23 GB", "368 GB")


# ---------------------------------------------------------------- outline


def test_cache_of_a_sliding_window_stops_growing() -> None:
    layer = CacheLayer(fixed_bytes=8, token_bytes=10, late_fixed_bytes=108, late_token_bytes=0)
    assert layer.size_bytes(100, keeps_all=True) == 1008
    assert [layer.size_bytes(n) for n in (1, 10, 11, 1000)] == [18, 108, 108, 108]


def test_cache_of_a_state_does_not_grow() -> None:
    layer = CacheLayer(fixed_bytes=64, token_bytes=0, late_fixed_bytes=64, late_token_bytes=0)
    assert layer.size_bytes(1) == layer.size_bytes(10**6) == 64


def test_cache_that_is_compressed_grows_later() -> None:
    layer = CacheLayer(fixed_bytes=0, token_bytes=0, late_fixed_bytes=0, late_token_bytes=2)
    assert layer.size_bytes(1000) == 2000


def test_expected_active_experts() -> None:
    layer = ExpertLayer(spec=SPEC, top_k=2)
    assert layer.expected_active(1) == pytest.approx(2)  # its own
    assert layer.expected_active(2) == pytest.approx(8 * (1 - 0.75**2))
    assert layer.expected_active(10_000) == pytest.approx(8)


PACKED = 512 * (448 + 4)  # whole panels and blocks; int8 codes and a float32 scale for each output


def test_packing_linear_layers_saves_what_they_no_longer_take() -> None:
    assert OUTLINE.packed_dense_bytes(INT8) == 2 * PACKED
    assert OUTLINE.saved_bytes(INT8) == 2 * (500 * 800 - PACKED)
    assert OUTLINE.total_dense_bytes(INT8) == 1_000_000 - 2 * (500 * 800 - PACKED)
    assert OUTLINE.total_dense_bytes() == 1_000_000


def test_a_tied_head_that_is_packed_takes_more_and_is_read_faster() -> None:
    head = LinearLayers(spec=LINEAR, count=1, element_bytes=2, is_shared=True)
    outline = replace(OUTLINE, linears=(head,))
    assert outline.total_dense_bytes(INT8) == 1_000_000 + PACKED
    assert outline.unpacked_read_bytes(INT8) == 800_000 - 500 * 800


def test_layers_that_packing_makes_larger_stay() -> None:
    thin = LinearLayers(spec=LinearSpec(in_features=8, out_features=500), count=1, element_bytes=2)
    outline = replace(OUTLINE, linears=(thin,))
    assert outline.packed_dense_bytes(INT8) == 0
    assert outline.total_dense_bytes(INT8) == 1_000_000
    assert outline.unpacked_read_bytes(INT8) == 800_000


# ---------------------------------------------------------------- what fits


def test_bytes_of_a_plan() -> None:
    plan = planner().plan(Formats(experts=BF16), WISH)
    host = plan.bytes_by_tier["host"]
    assert host["expert_weights"] == 2 * 8 * 600_000
    assert host["dense_weights"] == 1_000_000
    assert host["kv_cache"] == 100 * 100
    assert host["reserve"] == RESERVE_BYTES
    assert plan.total_weight_bytes == 9_600_000 + 1_000_000
    assert plan.fits
    assert plan.hot_experts == 0


def test_memory_that_is_one_byte_short() -> None:
    needed = planner().plan(Formats(experts=BF16), WISH).used_bytes("host")
    assert planner(needed).plan(Formats(experts=BF16), WISH).fits
    short = planner(needed - 1).plan(Formats(experts=BF16), WISH)
    assert not short.fits
    assert short.missing_bytes("host") == 1


def test_the_first_choice_that_fits_is_taken() -> None:
    choices = [Formats(experts=BF16), Formats(experts=INT8)]
    needed = planner().plan(choices[1], WISH).used_bytes("host")
    assert planner().best_plan(choices, WISH).formats.experts is BF16
    assert planner(needed).best_plan(choices, WISH).formats.experts is INT8
    assert not planner(needed - 1).best_plan(choices, WISH).fits
    with pytest.raises(UnsupportedFormatError, match="no weight format"):
        planner().best_plan([], WISH)


def card_for(experts: int, monkeypatch: pytest.MonkeyPatch) -> Card:
    """A card on which exactly that many bf16 experts find room."""
    monkeypatch.setattr(planner_module, "CARD_RESERVE_BYTES", 0)
    large = planner(card=Card(memory_bytes=1 << 40)).plan(Formats(experts=BF16), WISH)
    computing = (
        large.used_bytes("accelerator") - large.bytes_by_tier["accelerator"]["expert_weights"]
    )
    return Card(memory_bytes=computing + experts * 600_000 + 599_999)


@pytest.mark.parametrize("experts", [0, 5, 16, 99])
def test_hot_experts_fill_the_accelerator(experts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = planner(card=card_for(experts, monkeypatch)).plan(Formats(experts=BF16), WISH)
    assert plan.hot_experts == min(experts, 16)
    hot = plan.bytes_by_tier["accelerator"]["expert_weights"]
    assert hot == 600_000 * min(experts, 16)
    assert hot + plan.bytes_by_tier["host"]["expert_weights"] == 16 * 600_000
    assert plan.fits


def test_hot_experts_that_were_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    card = card_for(5, monkeypatch)
    fewer = planner(card=card).plan(Formats(experts=BF16), replace(WISH, hot_experts=3))
    assert (fewer.hot_experts, fewer.fits) == (3, True)
    more = planner(card=card).plan(Formats(experts=BF16), replace(WISH, hot_experts=7))
    assert (more.hot_experts, more.fits) == (7, False)


def test_longest_context() -> None:
    wish = replace(WISH, prompt=1)  # so that scratch does not depend on the context
    room = planner().plan(Formats(experts=BF16), wish)
    without_cache = room.used_bytes("host") - room.bytes_by_tier["host"]["kv_cache"]
    for tokens in (0, 1, 77, 999):
        plan = planner(without_cache + 100 * tokens + 99).plan(Formats(experts=BF16), wish)
        assert plan.max_context == tokens
    assert room.max_context == 1000  # what the model was made for


def test_formats_of_auto() -> None:
    assert format_names("auto") == ("bf16", "int8", "int4")
    assert format_names("fp8") == ("fp8",)


def test_check_before_loading() -> None:
    packed = {"bf16": 900, "int8": 500}
    enough = RESERVE_BYTES + 100
    assert first_that_fits(packed, 100, enough + 900) == "bf16"
    assert first_that_fits(packed, 100, enough + 899) == "int8"
    with pytest.raises(NotEnoughMemoryError, match=r"0\.30 GB as bf16, 0\.30 GB as int8"):
        first_that_fits(packed, 100, enough + 499)


# ---------------------------------------------------------------- how fast


def test_decode_on_the_host_is_bytes_over_bandwidth_and_calls() -> None:
    speed = planner().speed(Formats(experts=BF16), 0.0)
    times = decode_times(OUTLINE, speed, 100)
    assert times.host_experts_s == pytest.approx(2 * (2 * 600_000 / 9e9 + 2e-5))
    assert times.dense_s == pytest.approx(800_000 / 8e9)
    assert times.calls_s == pytest.approx(10 * 1e-5 + 100 * 1e-6)
    assert times.total_s == pytest.approx(times.host_experts_s + times.dense_s + times.calls_s)


def test_attention_grows_with_the_context() -> None:
    outline = replace(
        OUTLINE, decode=replace(WORK, attention_bytes=1000.0, pair_bytes=80.0, pair_flops=1.0)
    )
    speed = planner().speed(Formats(experts=BF16), 0.0)
    near, far = (decode_times(outline, speed, n).dense_s for n in (0, 500))
    assert far - near == pytest.approx(500 * (1000 / 1e9 + 80 / 8e9))


def test_packed_dense_layers_are_read_as_experts_are() -> None:
    speed = planner().speed(Formats(experts=BF16, dense=INT8), 0.0)
    read = replace(OUTLINE, decode_read_bytes=900_000)
    expected = 100_000 / 8e9 + 2 * PACKED / 9e9
    assert decode_times(read, speed, 1).dense_s == pytest.approx(expected)


def test_a_prompt_is_bound_by_operations() -> None:
    speed = planner().speed(Formats(experts=BF16), 0.0)
    operations = 2 * 4000 * 2 * 300_000
    assert prefill_times(OUTLINE, speed, 4000).host_experts_s == pytest.approx(
        2 * (operations / 3e11 + 2e-5)
    )


def test_hot_and_cold_experts_are_computed_at_the_same_time() -> None:
    fast = planner(card=Card(memory_bytes=1 << 30))
    cold, half, hot = (
        decode_times(OUTLINE, fast.speed(Formats(experts=BF16), share), 1)
        for share in (0.0, 0.5, 1.0)
    )
    assert cold.card_experts_s == hot.host_experts_s == 0
    assert half.host_experts_s - 4e-5 == pytest.approx((cold.host_experts_s - 4e-5) / 2)
    assert half.total_s == pytest.approx(
        half.dense_s + half.calls_s + max(half.host_experts_s, half.card_experts_s)
    )
    assert hot.total_s < half.total_s < cold.total_s


def test_hit_rate_is_a_parameter() -> None:
    skewed = replace(planner(card=Card(memory_bytes=1 << 30)), hit_rate=lambda share: share**0.5)
    uniform = planner(card=Card(memory_bytes=1 << 30))
    formats = Formats(experts=BF16)
    fast, slow = (decode_times(OUTLINE, p.speed(formats, 0.25), 1) for p in (skewed, uniform))
    assert fast.host_experts_s - 4e-5 == pytest.approx((slow.host_experts_s - 4e-5) * 0.5 / 0.75)


def test_long_prompts_are_streamed_where_that_is_faster() -> None:
    quick = planner(card=Card(memory_bytes=1 << 30, link_bytes_per_s=1e12))
    slow = planner(card=Card(memory_bytes=1 << 30, link_bytes_per_s=1e6))
    formats = Formats(experts=BF16)
    assert prefill_times(OUTLINE, quick.speed(formats, 0.0), 4000).link_s > 0
    assert prefill_times(OUTLINE, slow.speed(formats, 0.0), 4000).link_s == 0


# ---------------------------------------------------------------- advice


def advice(maker: Planner, *choices: Formats, wish: Wish = WISH) -> tuple[Plan, str]:
    plan = maker.best_plan(choices, wish)
    return plan, "\n".join(advise(maker, plan, choices, wish))


def test_advice_where_it_does_not_fit_is_true() -> None:
    needed = planner().plan(Formats(experts=INT8), WISH).used_bytes("host")
    maker = planner(needed)
    plan = maker.plan(Formats(experts=BF16), WISH)
    text = "\n".join(advise(maker, plan, [Formats(experts=INT8)], WISH))
    assert "host memory lacks 0.00 GB: 0.31 GB are needed with --format bf16" in text
    assert "it fits with --format int8" in text


def test_advice_where_nothing_fits_says_what_would() -> None:
    plan, text = advice(planner(1000), Formats(experts=BF16), Formats(experts=INT8))
    assert not plan.fits
    assert "with --format int8 it fits into" in text
    assert "(--ram)" in text
    needed = planner().plan(Formats(experts=INT8), WISH).used_bytes("host")
    assert planner(needed).plan(Formats(experts=INT8), WISH).fits


def test_advice_names_a_context_that_fits() -> None:
    wish = Wish(context=1000, prompt=1)
    room = planner().plan(Formats(experts=BF16), wish).used_bytes("host")
    maker = planner(room - 50_000)
    plan, text = advice(maker, Formats(experts=BF16), wish=wish)
    assert not plan.fits
    assert f"--context {plan.max_context}" in text
    assert maker.plan(Formats(experts=BF16), replace(wish, context=plan.max_context)).fits


def test_advice_on_hot_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, text = advice(planner(card=card_for(5, monkeypatch)), Formats(experts=BF16))
    assert "5 of 16 experts (31%) find room on the accelerator: --hot-experts 5" in text
    assert "with twice the accelerator memory" in text
    assert plan.fits


# ---------------------------------------------------------------- fine-tuning


def test_training_memory() -> None:
    memory = training_memory(OUTLINE, lora_rank=4, sequence_length=10)
    experts = 2 * 8 * 3 * (1000 + 100)
    assert memory.lora_parameters == 4 * (experts + 2 * (500 + 400))
    assert memory.adapter_bytes == 16 * memory.lora_parameters
    assert memory.logits_bytes == 2 * 4 * 10 * 100
    longer = training_memory(OUTLINE, lora_rank=4, sequence_length=20)
    assert longer.activation_bytes == 2 * memory.activation_bytes
    assert longer.adapter_bytes == memory.adapter_bytes


# ---------------------------------------------------------------- pictures


def test_curves() -> None:
    maker = planner(card=Card(memory_bytes=1 << 30))
    (curve,) = hot_curves(maker, [Formats(experts=BF16)], prompt=50)
    assert (curve.x[0], curve.x[-1]) == (0.0, 1.0)
    assert list(curve.tokens_per_s) == sorted(curve.tokens_per_s)
    decode, prefill = context_curves(maker, Formats(experts=BF16), 0.0, longest=1000)
    assert decode.x[-1] == prefill.x[-1] == 1000
    assert (decode.label, prefill.label) == ("decode", "prefill")


def test_plots_of_other_kinds_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match=r"--plot writes \.png and \.svg, got"):
        check_plot(tmp_path / "plan.pdf")


def test_missing_matplotlib_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr("kt_core.plan.plot.import_module", fail)
    with pytest.raises(InvalidRequestError, match=r"pip install 'kt-core\[plot\]'"):
        check_plot(tmp_path / "plan.png")


@pytest.mark.parametrize(("suffix", "start"), [(".png", b"\x89PNG"), (".svg", b"<?xml")])
def test_picture(suffix: str, start: bytes, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")
    maker = planner(card=Card(memory_bytes=1 << 30))
    hot = hot_curves(maker, [Formats(experts=BF16)], prompt=50)
    file = tmp_path / f"plan{suffix}"
    draw(file, "toy", hot, context_curves(maker, Formats(experts=BF16), 0.0, longest=1000))
    assert file.read_bytes().startswith(start)
    assert list(tmp_path.iterdir()) == [file]
