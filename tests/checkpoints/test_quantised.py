"""Quantised checkpoints, as others write them, load with the numbers that others read in them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

import kt_core
from checkpoints.schemes import SCHEMES, Scheme
from checkpoints.writing import QUANTISED, save_model, store_matrices, write_checkpoint
from kt_core import plugins
from kt_core.engine.model_files import read_config
from kt_core.engine.stored_checkpoint import open_stored
from kt_core.engine.stored_format import StoredFormats, formats_on_disk
from kt_core.interfaces import QuantizedTensor
from kt_core.quant.reference import dequantize

TOLERANCE = 2e-6
"""As in test_families: two float32 runs that differ in the order of sums."""
SIZES = {
    "hidden_size": 128,
    "moe_intermediate_size": 192,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_experts": 4,
}
"""The second is no multiple of 128: blocks at the edge are partial."""

Written = Callable[[Scheme], tuple[Path, Path]]


def named(scheme: Scheme) -> str:
    return scheme.name.replace(" ", "-")


every_scheme = pytest.mark.parametrize("scheme", SCHEMES, ids=named)


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """Return where the checkpoint of a scheme is, and where the same numbers are unquantised."""
    base = tmp_path_factory.mktemp("model")
    tensors = save_model("qwen3_moe", base, **SIZES)

    @cache
    def write(scheme: Scheme) -> tuple[Path, Path]:
        directory = tmp_path_factory.mktemp(named(scheme))
        stored, numbers = store_matrices(tensors, scheme.store)
        quantised = write_checkpoint(
            directory / "quantised", base, stored, quantization_config=dict(scheme.config)
        )
        return quantised, write_checkpoint(directory / "dense", base, numbers)

    return write


def load(directory: Path, **options: Any) -> Any:
    chosen: dict[str, Any] = {"threads": 1, "dtype": torch.float32, "precision": "float32"}
    return kt_core.load(directory, **{**chosen, **options})


def difference(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).abs().max() / want.abs().max())


@every_scheme
def test_every_number_is_what_the_oracle_reads(scheme: Scheme, written: Written) -> None:
    quantised, dense = written(scheme)
    registry = plugins.load()
    checkpoint = open_stored(quantised, read_config(quantised), registry)
    wanted = open_stored(dense, read_config(dense), registry)
    assert checkpoint.tensors.keys() == wanted.tensors.keys()
    matrices = [name for name in checkpoint.tensors if QUANTISED.search(name)]
    assert len(matrices) == 2 * 4 + 3 + 3 * 4
    for name in matrices:
        got, want = checkpoint.read(name), wanted.read(name)
        assert torch.equal(got, want), name
        matrix = checkpoint.stored(name)
        assert matrix is not None
        assert matrix.packed_format.name == scheme.packed
        if scheme.is_exact:
            packed = checkpoint.read_matrix(name)
            assert isinstance(packed, QuantizedTensor)
            assert packed.weight_format == matrix.weight_format
            assert torch.equal(dequantize(packed), got)


@every_scheme
def test_logits_are_those_of_transformers_on_the_same_numbers(
    scheme: Scheme, written: Written
) -> None:
    quantised, dense = written(scheme)
    truth = tiny.load_reference(dense)
    input_ids = tiny.sample_input_ids(truth.config)
    with load(quantised, format="auto" if scheme.is_exact else "bf16") as engine:
        got = tiny.logits(engine.model, input_ids)
        assert engine.stats().format == (scheme.packed if scheme.is_exact else "bf16")
    if not scheme.is_exact:
        with load(dense, format="bf16") as engine:
            want = tiny.logits(engine.model, input_ids)
    else:
        want = tiny.logits(truth, input_ids)
    assert difference(got, want) <= TOLERANCE


@every_scheme
def test_a_plan_starts_from_what_is_stored(scheme: Scheme, written: Written) -> None:
    """From the headers, as loading does; nothing is known of a config alone."""
    registry = plugins.load()
    quantised, dense = written(scheme)
    found = formats_on_disk(quantised, registry)
    assert {weight_format.name for weight_format in found.experts} == {scheme.packed}
    assert not found.is_packed
    assert formats_on_disk(dense, registry) == StoredFormats()
    assert formats_on_disk(quantised / "config.json", registry) == StoredFormats()


@every_scheme
def test_another_format_is_that_of_the_numbers(
    scheme: Scheme, written: Written, caplog: pytest.LogCaptureFixture
) -> None:
    """And the user is told that something is lost twice."""
    quantised, dense = written(scheme)
    input_ids = tiny.sample_input_ids(tiny.load_reference(dense).config)
    with load(dense, format="int4-g32-min") as engine:
        want = tiny.logits(engine.model, input_ids)
    caplog.clear()
    with load(quantised, format="int4-g32-min") as engine:
        got = tiny.logits(engine.model, input_ids)
    assert f"holds experts as {scheme.packed}" in caplog.text
    assert "quantised again, as int4-g32-min" in caplog.text
    assert difference(got, want) <= TOLERANCE
