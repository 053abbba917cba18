"""The kernels for AMX and AVX-VNNI, on a processor that has neither: ``nox -s amx`` builds them.

``amx_trapped`` is the object of a release; its tile instructions trap and are emulated.
``amx_emulated`` is the same source with function calls in their place. ``avx_vnni_512vl`` is the
source of ``avx_vnni`` in another encoding of the same instruction.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
import torch

from kernels.devices import device_for, open_when_asked
from kernels.test_forward import FORMATS, check
from kt_core import hardware
from kt_core.errors import UnsupportedFormatError
from kt_core.testing import reference
from kt_core.types import ActivationPrecision, MoeSpec
from kt_cpu import _kernels
from kt_cpu.backend import CpuDevice

# That amx_emulated makes the same bits as amx_trapped is a test of its own.
REAL = ["amx_trapped", "avx_vnni_512vl"]
TOKENS = [1, 3, 17, 33, 130]
SHAPES = [(1, 1), (63, 65), (129, 31), (200, 72), (320, 160)]
HAS_AMX = "amx_tile" in hardware.detect(with_accelerators=False).cpu.features

isas = dict(_kernels.isas())
if "amx_trapped" not in isas:
    pytest.skip("built without KT_TEST_ISAS: nox -s amx", allow_module_level=True)


def cells() -> list[tuple[str, ActivationPrecision]]:
    """Every format with every precision that it has."""
    found = []
    for name, weight_format in FORMATS.items():
        for precision in ActivationPrecision:
            if precision is ActivationPrecision.AUTO:
                continue
            spec = MoeSpec(num_experts=1, hidden_size=1, intermediate_size=1)
            try:
                with device_for("scalar", 1) as device:
                    device.expert_kernel(spec, weight_format.descriptor, precision=precision)
            except UnsupportedFormatError:
                continue
            found.append((name, precision))
    return found


CELLS = cells()
IN_CELLS = pytest.mark.parametrize(("name", "precision"), CELLS)
INT8 = [name for name, precision in CELLS if precision is ActivationPrecision.INT8]


Open = Callable[[str], CpuDevice]


@pytest.fixture(scope="module", autouse=True)
def one_torch_thread() -> Iterator[None]:
    """Torch's idle threads spin, on the cores that are under test: traps take ten times as long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def device() -> Iterator[Open]:
    with ExitStack() as stack:
        yield open_when_asked(stack)


def outputs(
    device: CpuDevice, name: str, precision: ActivationPrecision, spec: MoeSpec, tokens: int
) -> torch.Tensor:
    """What one expert makes of all tokens."""
    generator = torch.Generator().manual_seed(tokens)
    kernel = device.expert_kernel(spec, FORMATS[name].descriptor, precision=precision)
    kernel.load(0, reference.random_weights(spec, generator))
    hidden = torch.randn(tokens, spec.hidden_size, generator=generator)
    ids = torch.zeros(tokens, 1, dtype=torch.int64)
    return kernel.submit(hidden, ids, torch.ones(tokens, 1)).wait()


def test_the_processor_can_run_this() -> None:
    """Else everything here would be left out."""
    names = ["avx512_bf16", "amx_emulated", *REAL]
    assert {name: isas[name] for name in names} == dict.fromkeys(names, True)


@pytest.mark.parametrize("tokens", TOKENS)
@IN_CELLS
@pytest.mark.parametrize("isa", REAL)
def test_matches_the_reference(
    device: Open, isa: str, name: str, precision: ActivationPrecision, tokens: int
) -> None:
    spec = MoeSpec(num_experts=3, hidden_size=200, intermediate_size=72)
    check(device(isa), spec, FORMATS[name], precision, tokens)


@pytest.mark.parametrize("shape", SHAPES)
@IN_CELLS
@pytest.mark.parametrize("isa", REAL)
def test_odd_shapes(
    device: Open, isa: str, name: str, precision: ActivationPrecision, shape: tuple[int, int]
) -> None:
    spec = MoeSpec(num_experts=1, hidden_size=shape[0], intermediate_size=shape[1])
    check(device(isa), spec, FORMATS[name], precision, tokens=33, k=1)


@pytest.mark.parametrize("tokens", [*TOKENS, 7, 15, 16, 31, 32, 64, 65, 128, 129, 257])
@pytest.mark.parametrize("name", INT8)
@pytest.mark.parametrize("isa", REAL)
def test_integer_products_are_exact(device: Open, isa: str, name: str, tokens: int) -> None:
    """Bit for bit those of AVX-512 with VNNI, which this processor has.

    Sums of float32 follow in the same order there and here: one wrong unit in an int32 would show.
    """
    spec = MoeSpec(num_experts=1, hidden_size=200, intermediate_size=72)
    precision = ActivationPrecision.INT8
    want = outputs(device("avx512_bf16"), name, precision, spec, tokens)
    assert torch.equal(outputs(device(isa), name, precision, spec, tokens), want)


@pytest.mark.parametrize("tokens", TOKENS)
@IN_CELLS
def test_real_instructions_and_emulated_ones_agree(
    device: Open, name: str, precision: ActivationPrecision, tokens: int
) -> None:
    if HAS_AMX and precision is ActivationPrecision.BF16:
        pytest.skip("this processor has AMX, whose sums of bfloat16 may round otherwise")
    spec = MoeSpec(num_experts=1, hidden_size=160, intermediate_size=96)
    trapped = outputs(device("amx_trapped"), name, precision, spec, tokens)
    assert torch.equal(trapped, outputs(device("amx_emulated"), name, precision, spec, tokens))


@pytest.mark.skipif(HAS_AMX, reason="this processor has AMX: nothing traps")
@pytest.mark.parametrize("precision", [ActivationPrecision.INT8, ActivationPrecision.BF16])
def test_the_tiles_are_used_for_many_tokens(device: Open, precision: ActivationPrecision) -> None:
    trapped = ctypes.CDLL(_kernels.__file__).kt_amx_trapped
    trapped.restype = ctypes.c_ulong
    spec = MoeSpec(num_experts=1, hidden_size=64, intermediate_size=32)
    counts = []
    for tokens in (1, 17):
        before = trapped()
        outputs(device("amx_trapped"), "int8", precision, spec, tokens)
        counts.append(trapped() - before)
    assert counts[0] == 0
    assert counts[1] > 0


def test_where_the_system_refuses_the_tiles_amx_is_not_supported() -> None:
    assert isas["amx_refused"] is False
    with pytest.raises(RuntimeError, match="its operating system refuses it"):
        _kernels.select_isa("amx_refused")


def test_none_of_these_is_taken_unasked() -> None:
    assert _kernels.select_isa("") == "scalar"
