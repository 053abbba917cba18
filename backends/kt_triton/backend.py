"""What the backends over Triton share: every format, on devices that torch calls ``cuda``."""

from __future__ import annotations

import importlib.util
import os
from typing import TYPE_CHECKING

from kt_core.accelerator import TorchBackend
from kt_core.types import ActivationPrecision, Capabilities, Element, Format, LinearSpec, MoeSpec

if TYPE_CHECKING:
    import torch

    from kt_core.interfaces import ExpertKernel, LinearKernel


class TritonBackend(TorchBackend):
    """A backend whose kernels are ``kt_triton``'s.

    Attributes:
        package: What pip installs to bring Triton, as the user types it.
    """

    package: str

    def what_it_computes(self) -> Capabilities:
        """Every element in every grouping: the loader in ``kt_triton.tiles`` is generic."""
        return Capabilities(elements=frozenset(Element), computes_dense=True)

    def kernel(
        self,
        device: torch.device,
        spec: MoeSpec,
        weight_format: Format,
        precision: ActivationPrecision,
    ) -> ExpertKernel:
        """See ``TorchBackend.kernel``."""
        from kt_triton.kernel import TritonExpertKernel

        return TritonExpertKernel(device, spec, weight_format, precision)

    def linear_kernel(
        self,
        device: torch.device,
        spec: LinearSpec,
        weight_format: Format,
        precision: ActivationPrecision,
    ) -> LinearKernel:
        """See ``TorchBackend.linear_kernel``."""
        from kt_triton.linear_kernel import TritonLinearKernel

        return TritonLinearKernel(device, spec, weight_format, precision)

    def why_no_triton(self) -> str | None:
        """Return None if Triton is installed. Does not import it."""
        if importlib.util.find_spec("triton") is None:
            return (
                f"Triton, which compiles its kernels, is not installed: pip install {self.package}"
            )
        return None


def hidden_by(*variables: str) -> str:
    """Name the environment variables that are set and may hide devices."""
    found = [f"{name}={os.environ[name]}" for name in variables if name in os.environ]
    return f" ({', '.join(found)} may hide them)" if found else ""
