"""The experts of one layer on one device: hold their packed weights, compute their outputs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kt_core.errors import UnsupportedTrainingError
from kt_core.interfaces.checks import check_together
from kt_core.interfaces.host_functions import HostCall
from kt_core.interfaces.weight_format import QuantizedTensor
from kt_core.types import ActivationPrecision, Format, MoeSpec

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertWeights:
    """Weights of one expert in canonical orientation, whatever their layout on disk.

    Each projection is either a dense tensor (bfloat16, float16 or float32; any strides, so that
    transposed and interleaved checkpoints are views, not copies) or already quantised.

    Attributes:
        up: ``[intermediate, hidden]``.
        down: ``[hidden, intermediate]``.
        gate: ``[intermediate, hidden]``; None for an expert without a gate.
        up_bias: ``[intermediate]`` or None.
        down_bias: ``[hidden]`` or None.
        gate_bias: ``[intermediate]`` or None.
    """

    up: torch.Tensor | QuantizedTensor
    down: torch.Tensor | QuantizedTensor
    gate: torch.Tensor | QuantizedTensor | None = None
    up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None
    gate_bias: torch.Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraWeights:
    """Low-rank additions to the projections: ``W x`` becomes ``W x + scale * B (A x)``.

    (LoRA: Hu et al. 2021, arXiv:2106.09685.) Any subset of the projections; A and B of one are
    there or absent together. float32 or bfloat16, computed in float32. ``rank`` may differ from
    projection to projection.

    Attributes:
        scale: Factor of every addition; alpha / rank, usually.
        gate_a: ``[num_experts, rank, hidden]``, as ``up_a``.
        gate_b: ``[num_experts, intermediate, rank]``, as ``up_b``.
        up_a: See ``gate_a``.
        up_b: See ``gate_b``.
        down_a: ``[num_experts, rank, intermediate]``.
        down_b: ``[num_experts, hidden, rank]``.
    """

    scale: float
    gate_a: torch.Tensor | None = None
    gate_b: torch.Tensor | None = None
    up_a: torch.Tensor | None = None
    up_b: torch.Tensor | None = None
    down_a: torch.Tensor | None = None
    down_b: torch.Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertGradients:
    """What ``ExpertKernel.backward`` returns.

    Attributes:
        hidden: ``[tokens, hidden]``, of the hidden states' type.
        weights: ``[tokens, k]``, of the routing weights' type; 0 for somebody else's pairs.
        lora: Gradients in the places of the matrices, of their shapes and types; 0 for experts no
            token went to. None where there was no LoRA.
    """

    hidden: torch.Tensor
    weights: torch.Tensor
    lora: LoraWeights | None = None


class Ticket(ABC):
    """Work that was submitted. Dropping it without waiting must not leak or crash."""

    @abstractmethod
    def wait(self) -> torch.Tensor:
        """Return ``[tokens, hidden]`` in the hidden states' type and on their device.

        Blocks until the work is done; on a device with streams it does not block, and the result
        is there for what is put into the stream of ``submit`` afterwards.

        Raises:
            RuntimeError: The computation failed; the message says how.
        """


class ExpertKernel(ABC):
    """Packed experts of one layer.

    ``load`` may be called from several threads at once for different experts; everything else
    is called from one thread at a time.

    Attributes:
        spec: Shape and activation of the layer.
        weight_format: How the weights are stored.
        trains: Whether ``submit_training`` and ``backward`` can be called. As the device's
            ``Capabilities.trains``.
        moves_packed: Whether ``packed``, ``load_packed`` and their like can be called.
    """

    spec: MoeSpec
    weight_format: Format
    trains: bool = False
    moves_packed: bool = False

    @property
    @abstractmethod
    def bytes_per_expert(self) -> int:
        """Bytes of device memory one packed expert takes."""

    @property
    def capture_version(self) -> int:
        """A number that grows whenever graphs that hold a ``submit`` may not be replayed any more.

        By default it stays: residency is read on the device, in stream order.
        """
        return 0

    def precision_for(self, hidden_type: torch.dtype) -> ActivationPrecision | None:
        """Return what hidden states of this type are turned into: what ``AUTO`` stands for.

        For those who measure kernels. By default None: nobody knows.
        """
        del hidden_type
        return None

    @abstractmethod
    def load(self, expert: int, weights: ExpertWeights) -> None:
        """Quantise (where the weights are dense) and pack one expert; it becomes resident.

        Loading an expert again replaces it. The tensors are not kept.

        Raises:
            ValueError: ``expert`` is out of range, a shape does not fit ``spec``, a quantised
                tensor has another format, or a weight or scale is NaN or infinite.
        """

    def packed(self, expert: int) -> torch.Tensor:
        """Return a resident expert's packed bytes, ``[bytes]`` uint8, on the kernel's device.

        They lie as kt_core/packed/ describes, the same on every device. Where the kernel keeps
        them in one piece this is a view, which must not be written to and is valid until the
        expert is unloaded or loaded again; else a copy.

        Raises:
            ValueError: ``expert`` is not resident, or ``moves_packed`` is False.
        """
        raise ValueError(self._why_unmoved(expert))

    def load_packed(self, expert: int, packed: torch.Tensor) -> None:
        """Make an expert resident with bytes that ``packed`` of another kernel returned: a copy.

        On a device with streams the copy is put into the current stream, and the host does not
        wait where ``packed`` is pinned; the expert counts as resident for what is put into that
        stream afterwards. The tensor must not change before the copy is done.

        Raises:
            ValueError: ``expert`` is out of range, ``packed`` is not ``[bytes]`` uint8 of this
                layer's packed experts, or ``moves_packed`` is False.
        """
        del packed
        raise ValueError(self._why_unmoved(expert))

    def gather_packed(self, experts: Sequence[int], out: torch.Tensor) -> None:
        """Write the packed bytes of several experts to host memory, one after the other.

        They are there when it returns. By default each is copied by itself: a kernel in host memory
        should use all its threads, since this is what long prompts wait for.

        Args:
            experts: Resident ones, in any order, each once.
            out: ``[len(experts) * bytes]`` uint8 on the host, pinned or not.

        Raises:
            ValueError: An expert is not resident or named twice, ``out`` does not fit, or
                ``moves_packed`` is False. ``out`` may then hold anything.
        """
        size = check_together(self.spec, experts, out)
        for index, expert in enumerate(experts):
            packed = self.packed(expert)
            if packed.numel() != size:
                msg = f"a packed expert of this layer is {packed.numel()} bytes, out has {size}"
                raise ValueError(msg)
            out[index * size : (index + 1) * size].copy_(packed)

    def load_packed_together(self, experts: Sequence[int], packed: torch.Tensor) -> None:
        """As ``load_packed`` of several experts, whose bytes lie one after the other.

        By default each is loaded by itself. A device with memory of its own should copy them at
        once: a layer of small experts is bound by what is done for each.

        Args:
            experts: In any order, each once.
            packed: ``[len(experts) * bytes]`` uint8.

        Raises:
            ValueError: An expert is out of range or named twice, ``packed`` does not fit, or
                ``moves_packed`` is False. No expert has changed.
        """
        size = check_together(self.spec, experts, packed)
        for index, expert in enumerate(experts):
            self.load_packed(expert, packed[index * size : (index + 1) * size])

    def map_packed(self, expert: int, packed: torch.Tensor) -> bool:
        """As ``load_packed``, but use the bytes where they are, if the kernel can.

        For experts in mapped files: pages are read when they are first used, and may be dropped by
        the system. ``packed`` is on the host, at an address that is a multiple of 64.

        Returns:
            Whether the kernel keeps ``packed``, which then must not change until the expert is
            unloaded or loaded again. By default, and on devices with memory of their own, it is
            copied.

        Raises:
            ValueError: As for ``load_packed``.
        """
        self.load_packed(expert, packed)
        return False

    def _why_unmoved(self, expert: int) -> str:
        return (
            f"{type(self).__name__} cannot move expert {expert} as packed bytes: load its weights "
            f"instead"
        )

    @abstractmethod
    def unload(self, expert: int) -> None:
        """Give the memory of one expert back; does nothing when it is not resident."""

    def unload_all(self) -> None:
        """Give the memory of all experts back. By default one by one."""
        for expert in self.resident():
            self.unload(expert)

    @abstractmethod
    def resident(self) -> frozenset[int]:
        """Experts that are loaded."""

    @abstractmethod
    def submit(
        self, hidden: torch.Tensor, expert_ids: torch.Tensor, weights: torch.Tensor
    ) -> Ticket:
        """Start ``out[t] = sum_k weights[t, k] * expert[expert_ids[t, k]](hidden[t])``.

        The tensors must stay unchanged until the ticket is waited for. On a device with streams
        the work is put into the current one, and ids are never read by the host: there an expert
        that is not resident adds nothing, and so does an id that no expert has.

        Args:
            hidden: ``[tokens, hidden]``, bfloat16, float16 or float32, any ``tokens >= 0``.
            expert_ids: ``[tokens, k]`` integers, ``k >= 1``; -1 marks a pair that is somebody
                else's and adds nothing. The same expert may stand twice in a row.
            weights: ``[tokens, k]``, floating point.

        Raises:
            ValueError: A shape or type is wrong, an id is outside ``-1..num_experts-1``, or an
                expert is not resident.
        """

    def host_call(
        self,
        hidden: torch.Tensor,
        expert_ids: torch.Tensor,
        weights: torch.Tensor,
        out: torch.Tensor,
    ) -> HostCall | None:
        """Return ``submit`` as two host functions, for an accelerator's stream to call.

        Each time the stream comes past, ``out`` is computed of what the other tensors hold then.
        They must outlive the call. By default None: this kernel cannot, and the host waits for the
        stream instead.

        Args:
            hidden: ``[tokens, hidden]``, bfloat16 or float32, in host memory, as all of them.
            expert_ids: ``[tokens, k]`` int64.
            weights: ``[tokens, k]`` float32.
            out: ``[tokens, hidden]``, of the hidden states' type.
        """
        del hidden, expert_ids, weights, out
        return None

    def submit_training(
        self,
        hidden: torch.Tensor,
        expert_ids: torch.Tensor,
        weights: torch.Tensor,
        lora: LoraWeights | None = None,
    ) -> Ticket:
        """Start the forward pass that ``backward`` differentiates.

        As ``submit``, with LoRA added. May use more precise activations than ``submit`` where the
        precision is the device's own choice. Keeps nothing: it may be called any number of times
        before or after ``backward``, as gradient checkpointing does.

        Raises:
            ValueError: As for ``submit``; or a LoRA matrix has another shape or type.
            UnsupportedTrainingError: ``trains`` is False.
        """
        del hidden, expert_ids, weights, lora
        raise UnsupportedTrainingError(self._why_untrainable())

    def backward(
        self,
        hidden: torch.Tensor,
        expert_ids: torch.Tensor,
        weights: torch.Tensor,
        grad_out: torch.Tensor,
        lora: LoraWeights | None = None,
    ) -> ExpertGradients:
        """Differentiate ``submit_training`` of the same arguments; returns when it is done.

        The packed weights themselves are frozen. Called from within an operator, where torch's own
        autograd does not record.

        Args:
            hidden: As given to ``submit_training``.
            expert_ids: As given to ``submit_training``.
            weights: As given to ``submit_training``.
            grad_out: Gradient of the output, ``[tokens, hidden]``, of the hidden states' type.
            lora: As given to ``submit_training``.

        Raises:
            ValueError: As for ``submit_training``.
            UnsupportedTrainingError: ``trains`` is False.
        """
        del hidden, expert_ids, weights, grad_out, lora
        raise UnsupportedTrainingError(self._why_untrainable())

    def _why_untrainable(self) -> str:
        return (
            f"{type(self).__name__} has no gradient for experts of {self.weight_format.name!r}: "
            "use torch.no_grad(), or a device whose capabilities say that it trains"
        )
