"""The backend ``xpu``: Triton where torch's XPU build has brought it, else torch's operators."""

from __future__ import annotations

from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING

from kt_core.accelerator import TorchBackend
from kt_core.errors import UnsupportedFormatError
from kt_core.types import (
    ActivationPrecision,
    Capabilities,
    Element,
    Format,
    MoeSpec,
    ScaleType,
)

if TYPE_CHECKING:
    import torch

    from kt_core.interfaces import ExpertKernel

# What Intel's drivers make for each GPU.
RENDER_NODES = Path("/dev/dri")
# Formats of torch's own operators: docs/decisions/0017.
TORCH_FORMATS = frozenset(
    {"bf16", *(f"int4-g{size}{offset}" for size in (32, 64, 128) for offset in ("", "-asym"))}
)


class XpuBackend(TorchBackend):
    """Intel GPUs through upstream torch: docs/decisions/0001."""

    name = "xpu"
    preference = 15
    device_type = "xpu"

    def why_unavailable(self) -> str | None:
        """Return the first thing that is missing."""
        import torch

        if torch.version.xpu is None:
            return (
                f"torch {torch.__version__} is not built for XPU: install it from "
                "https://download.pytorch.org/whl/xpu (docs/install.md)"
            )
        if not any(RENDER_NODES.glob("renderD*")):
            return (
                f"there is no GPU driver ({RENDER_NODES}/renderD* is missing): install Intel's, "
                "or start the container with --device /dev/dri"
            )
        if torch.xpu.device_count() == 0:
            return (
                "Level Zero shows no GPU: add your user to the group render and log in again, and "
                "see what sycl-ls says"
            )
        return None

    def what_it_computes(self) -> Capabilities:
        """Every element with Triton; else what torch has an operator for."""
        if triton_knows_xpu():
            return Capabilities(elements=frozenset(Element))
        return Capabilities(formats=TORCH_FORMATS)

    def expert_bytes(self, spec: MoeSpec, weight_format: Format) -> int:
        """See ``TorchBackend.expert_bytes``."""
        if triton_knows_xpu():
            return super().expert_bytes(spec, weight_format)
        from kt_core.accelerator.converted_kernel import converted_bytes
        from kt_xpu.torch_experts import GROUP_BYTES

        return converted_bytes(spec, weight_format, GROUP_BYTES)

    def kernel(
        self,
        device: torch.device,
        spec: MoeSpec,
        weight_format: Format,
        precision: ActivationPrecision,
    ) -> ExpertKernel:
        """See ``TorchBackend.kernel``.

        Raises:
            UnsupportedFormatError: Torch's operators know no such groups, or round to bfloat16.
        """
        if triton_knows_xpu():
            from kt_triton.kernel import TritonExpertKernel

            return TritonExpertKernel(device, spec, weight_format, precision)
        from kt_core.accelerator.converted_kernel import why_not_whole
        from kt_xpu.torch_experts import TorchExpertKernel

        if why := why_not_whole(spec, weight_format):
            raise UnsupportedFormatError(why)
        if precision is ActivationPrecision.FLOAT32:
            msg = (
                "without Triton an xpu computes with bfloat16 activations only; install torch's "
                "XPU build with its Triton (https://download.pytorch.org/whl/xpu), or choose auto"
            )
            raise UnsupportedFormatError(msg)
        assert weight_format.scale in {None, ScaleType.BF16}
        return TorchExpertKernel(device, spec, weight_format, precision)


def triton_knows_xpu() -> bool:
    """Whether the Triton that is installed compiles for Intel's GPUs. Does not import it."""
    return any(point.name == "intel" for point in entry_points(group="triton.backends"))
