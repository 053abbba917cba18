from collections.abc import Callable, Sequence
from typing import TypeAlias, overload

class DType:
    float32: DType
    bfloat16: DType
    float16: DType

class Precision:
    @property
    def name(self) -> str: ...
    float32: Precision
    bf16: Precision
    int8: Precision

class Element:
    bf16: Element
    fp8: Element
    int8: Element
    int4: Element
    fp4: Element

class ScaleType:
    none: ScaleType
    float32: ScaleType
    bf16: ScaleType
    float16: ScaleType
    e8m0: ScaleType
    e4m3: ScaleType

class Offset:
    none: Offset
    zero_point: Offset
    minimum: Offset

class ActivationKind: ...

class LayerSpec:
    def __init__(
        self,
        *,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        activation: ActivationKind,
        is_gated: bool,
        alpha: float,
        limit: float,
        up_limit: float,
        has_bias: bool,
        element: Element,
        scale: ScaleType,
        offset: Offset,
        group: int,
    ) -> None: ...
    @property
    def bytes_per_expert(self) -> int: ...

# Addresses of A and B, their type, the rank, addresses of their gradients (0: none).
LoraMatrices: TypeAlias = tuple[int, int, DType, int, int, int]
# The scale, then gate, up and down.
Lora: TypeAlias = tuple[float, LoraMatrices | None, LoraMatrices | None, LoraMatrices | None]

# Address, size in bytes, node, whether pages may come from no other; returns an errno, or 0.
BindPages: TypeAlias = Callable[[int, int, int, bool], int]

class Device:
    @overload
    def __init__(self, isa: str, threads: int) -> None: ...
    @overload
    def __init__(
        self,
        isa: str,
        # (id, logical processors, bytes that may be bound to it)
        nodes: Sequence[tuple[int, Sequence[int], int]],
        # (place among the nodes, logical processors); the first is whoever waits
        threads: Sequence[tuple[int, Sequence[int]]],
        bind: BindPages | None = None,
    ) -> None: ...
    @property
    def isa(self) -> str: ...
    # Why a thread could not be pinned, or memory not be bound; empty if all could.
    @property
    def pin_refusal(self) -> str: ...
    @property
    def bind_refusal(self) -> str: ...
    # Nanoseconds: there was work; a stream waited for it.
    def usage(self) -> tuple[int, int]: ...

class Ticket:
    def wait(self) -> None: ...

class PackedBytes:
    def __buffer__(self, flags: int, /) -> memoryview: ...

class StreamCall:
    @property
    def address(self) -> int: ...
    def take_error(self) -> str: ...
    def record(self, is_on: bool, /) -> None: ...
    def take_times(self) -> list[tuple[int, int, int, int]]: ...

stream_call_start: int
stream_call_join: int

class ExpertLayer:
    def __init__(self, device: Device, spec: LayerSpec) -> None: ...
    def load(
        self,
        expert: int,
        *,
        gate: tuple[int, DType, int, int, int, int, int, int] | None,
        up: tuple[int, DType, int, int, int, int, int, int],
        down: tuple[int, DType, int, int, int, int, int, int],
        gate_bias: int,
        up_bias: int,
        down_bias: int,
    ) -> str: ...
    def unload(self, expert: int) -> None: ...
    def is_resident(self, expert: int) -> bool: ...
    def load_packed(self, expert: int, packed: int) -> None: ...
    def map_packed(self, expert: int, packed: int, owner: object) -> bool: ...
    def packed(self, expert: int) -> PackedBytes | None: ...
    def copy_packed(self, expert: int, target: int) -> None: ...
    def gather_packed(self, experts: Sequence[int], target: int) -> None: ...
    # Of each node: outputs of gate and up, outputs of down, address and size in bytes.
    def parts(self, expert: int) -> list[tuple[int, int, int, int]]: ...
    def submit(
        self,
        *,
        hidden: int,
        type: DType,
        precision: Precision,
        expert_ids: int,
        weights: int,
        out: int,
        tokens: int,
        top_k: int,
    ) -> Ticket: ...
    def stream_call(
        self,
        *,
        hidden: int,
        type: DType,
        precision: Precision,
        expert_ids: int,
        weights: int,
        out: int,
        tokens: int,
        top_k: int,
    ) -> StreamCall: ...
    def submit_lora(
        self,
        *,
        hidden: int,
        type: DType,
        precision: Precision,
        expert_ids: int,
        weights: int,
        out: int,
        tokens: int,
        top_k: int,
        lora: Lora,
    ) -> Ticket: ...
    def submit_backward(
        self,
        *,
        hidden: int,
        type: DType,
        precision: Precision,
        expert_ids: int,
        weights: int,
        tokens: int,
        top_k: int,
        lora: Lora | None,
        grad_out: int,
        grad_hidden: int,
        grad_weights: int,
    ) -> Ticket: ...

class LinearSpec:
    def __init__(
        self,
        *,
        in_features: int,
        out_features: int,
        has_bias: bool,
        element: Element,
        scale: ScaleType,
        offset: Offset,
        group: int,
    ) -> None: ...
    @property
    def size_bytes(self) -> int: ...

class LinearLayer:
    def __init__(self, device: Device, spec: LinearSpec) -> None: ...
    def load(self, weight: tuple[int, DType, int, int, int, int, int, int], bias: int) -> bool: ...
    def map_packed(self, packed: int, owner: object) -> None: ...
    @property
    def is_loaded(self) -> bool: ...
    def packed_bytes(self) -> bytes: ...
    def apply(
        self,
        source: int,
        type: DType,
        precision: Precision,
        rows: int,
        source_stride: int,
        target: int,
        /,
    ) -> None: ...
    def grad_input(
        self,
        source: int,
        type: DType,
        precision: Precision,
        rows: int,
        source_stride: int,
        target: int,
        /,
    ) -> None: ...

def bind_pages(base: int, bytes: int, node: int, is_strict: bool) -> int: ...
def why_not_bound(node: int) -> str: ...
def nodes_of_pages(base: int, bytes: int) -> list[int]: ...
def measure_limits(isa: str, threads: int, buffer_bytes: int) -> tuple[float, float, float]: ...
def isas() -> list[tuple[str, bool]]: ...
def select_isa(name: str) -> str: ...
def activate(
    isa: str,
    kind: ActivationKind,
    is_gated: bool,
    alpha: float,
    limit: float,
    up_limit: float,
    gate: int,
    up: int,
    out: int,
    n: int,
) -> None: ...
