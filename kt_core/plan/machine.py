"""The machine a plan is for: this one as measured, or one that somebody describes."""

from __future__ import annotations

from dataclasses import dataclass

from kt_core.types import Format

# What a described machine is taken for where nobody says, as measured on two cores of an EPYC with
# AVX-512, VNNI and BF16, torch 2.13: docs/planning.md, "Efficiencies".
INT8_OPS_PER_CORE = 1080e9
BF16_OPS_PER_CORE = 500e9
DENSE_READ_FRACTION = 0.5
DENSE_OPS_FRACTION = 0.9
ATTENTION_READ_FRACTION = 0.11
ATTENTION_OPS_FRACTION = 0.12
THREADED_CALL_S = 50e-6
CALL_S = 2.3e-6
# docs/performance.md, "Results": 84-90 % of the read limit with one token, 47-69 % of the
# int8 peak and 72-80 % of the bf16 peak with many.
EXPERT_READ_FRACTION = 0.85
EXPERT_INT8_FRACTION = 0.55
EXPERT_BF16_FRACTION = 0.75
EXPERT_CALL_S = 60e-6
# A card of which only the memory is given: NVIDIA's data sheet of the GeForce RTX 4090.
CARD_READ_BYTES_PER_S = 1008e9
CARD_OPS_PER_S = 165.2e12
LINK_BYTES_PER_S = 31.5e9  # PCIe 4.0 x16: 16 GT/s, 128b/130b


@dataclass(frozen=True, slots=True, kw_only=True)
class HostRates:
    """How fast the host is.

    Attributes:
        read_bytes_per_s: Reads of memory, all cores together.
        int8_ops_per_s: Products of int8, a multiply-add being two.
        bf16_ops_per_s: Products of bf16.
        dense_read_bytes_per_s: Weights that torch reads for a single token.
        dense_ops_per_s: Operations of torch's matrix product with many tokens.
        attention_read_bytes_per_s: Keys and values that torch's attention reads for one token.
        attention_ops_per_s: Operations of torch's attention with many tokens.
        threaded_call_s: Seconds of a call that wakes torch's threads, for next to no work.
        call_s: The same of any other call, with what Python does around it.
        expert_call_s: Seconds of a layer of routed experts besides its work: torch's threads and
            those of the experts take turns.
    """

    read_bytes_per_s: float
    int8_ops_per_s: float
    bf16_ops_per_s: float
    dense_read_bytes_per_s: float
    dense_ops_per_s: float
    attention_read_bytes_per_s: float
    attention_ops_per_s: float
    threaded_call_s: float
    call_s: float
    expert_call_s: float

    def __post_init__(self) -> None:
        for field in self.__dataclass_fields__:
            if not getattr(self, field) > 0:
                msg = f"{field} must be above 0, got {getattr(self, field)}"
                raise ValueError(msg)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertRates:
    """How fast the host computes experts of one shape and format.

    Attributes:
        read_bytes_per_s: Packed weights of active experts, with a single token.
        ops_per_s: Operations, with many tokens; a multiply-add is two.
    """

    read_bytes_per_s: float
    ops_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """The accelerators, all of one kind; a layer is spread over all of them.

    Attributes:
        count: Their number.
        memory_bytes: Of each.
        read_bytes_per_s: Reads of its memory, of each.
        ops_per_s: bf16 operations of each, a multiply-add being two.
        link_bytes_per_s: From host memory to each.
    """

    count: int = 1
    memory_bytes: int
    read_bytes_per_s: float = CARD_READ_BYTES_PER_S
    ops_per_s: float = CARD_OPS_PER_S
    link_bytes_per_s: float = LINK_BYTES_PER_S

    @property
    def total_memory_bytes(self) -> int:
        """Of all of them."""
        return self.count * self.memory_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What a plan is made for.

    Attributes:
        memory_bytes: Host memory that the model may take.
        cores: Physical cores that compute.
        host: How fast they are.
        card: The accelerators, or None.
        assumptions: What nobody measured or said, in sentences.
    """

    memory_bytes: int
    cores: int
    host: HostRates
    card: Card | None = None
    assumptions: tuple[str, ...] = ()


def described_rates(
    *,
    read_bytes_per_s: float,
    cores: int,
    int8_ops_per_s: float | None = None,
    bf16_ops_per_s: float | None = None,
) -> HostRates:
    """Return the rates of a host that is not at hand, from its bandwidth and number of cores.

    Args:
        read_bytes_per_s: What a read test measures, not the product on the data sheet.
        cores: Physical ones.
        int8_ops_per_s: Of all cores; None for as fast as ours for each.
        bf16_ops_per_s: As ``int8_ops_per_s``.
    """
    bf16 = bf16_ops_per_s or cores * BF16_OPS_PER_CORE
    return HostRates(
        read_bytes_per_s=read_bytes_per_s,
        int8_ops_per_s=int8_ops_per_s or cores * INT8_OPS_PER_CORE,
        bf16_ops_per_s=bf16,
        dense_read_bytes_per_s=DENSE_READ_FRACTION * read_bytes_per_s,
        dense_ops_per_s=DENSE_OPS_FRACTION * bf16,
        attention_read_bytes_per_s=ATTENTION_READ_FRACTION * read_bytes_per_s,
        attention_ops_per_s=ATTENTION_OPS_FRACTION * bf16,
        threaded_call_s=THREADED_CALL_S,
        call_s=CALL_S,
        expert_call_s=EXPERT_CALL_S,
    )


def described_expert_rates(host: HostRates, weight_format: Format) -> ExpertRates:
    """Return how fast our kernels should be on a host that is not at hand."""
    is_integer = weight_format.element.is_integer
    peak = host.int8_ops_per_s if is_integer else host.bf16_ops_per_s
    return ExpertRates(
        read_bytes_per_s=EXPERT_READ_FRACTION * host.read_bytes_per_s,
        ops_per_s=(EXPERT_INT8_FRACTION if is_integer else EXPERT_BF16_FRACTION) * peak,
    )
