"""What backends share whose devices are torch's: for those that write one, ours or not.

``TorchBackend`` lists devices and opens them. ``packed_kernel`` holds packed experts on one, and
``packed_linear_kernel`` a packed dense layer: they leave only the computation to be written;
``converted_kernel`` is for operators that want another form; ``doorbell`` calls the host from a
stream. None of them knows a vendor.
"""

from __future__ import annotations

from kt_core.accelerator.torch_backend import TorchBackend, TorchExpertDevice

__all__ = ["TorchBackend", "TorchExpertDevice"]
