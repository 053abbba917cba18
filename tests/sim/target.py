"""The accelerator that these tests use: the simulated one, or the one that KT_TEST_DEVICE names.

``KT_TEST_DEVICE=cuda`` runs on a GPU whatever asks nothing of a device that only a simulated one
can do, such as to fail.
"""

from __future__ import annotations

import os

import pytest
import torch

from kt_core import plugins
from kt_core.interfaces import Backend, ExpertDevice, HostFunctions
from kt_core.moe.streamed_layers import StreamedLayers, StreamRates
from kt_core.testing.backend_harness import Pairs
from kt_sim.native import NativeDevice
from kt_sim.settings import VARIABLE, parse

NAME = os.environ.get("KT_TEST_DEVICE", "sim")
IS_SIM = NAME == "sim"
# Torch's name may be another: rocm's devices are cuda's.
TYPE = {"rocm": "cuda"}.get(NAME, NAME)
WHERE = f"{TYPE}:0"
FAST = (
    "devices=2,memory_gib=0.25,link_gb_s=0,link_latency_us=0,memory_gb_s=0,"
    "float32_tflops=0,float16_tflops=0"
)
# Before there are devices: the contract suite asks for them while tests are collected.
os.environ.setdefault(VARIABLE, FAST)
BACKEND: Backend = plugins.load().backends.get(NAME)

only_sim = pytest.mark.skipif(not IS_SIM, reason="needs a device that is simulated")


def opened(index: int = 0) -> ExpertDevice:
    """Open a device; skip where there are fewer."""
    names = [info.name for info in BACKEND.devices()]
    if index >= len(names):
        pytest.skip(f"there is no {NAME}:{index}")
    return BACKEND.open(names[index])


def there(pairs: Pairs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Copy the arguments of a call to the device."""
    return pairs.hidden.to(WHERE), pairs.expert_ids.to(WHERE), pairs.weights.to(WHERE)


def host_functions() -> HostFunctions:
    """What calls the host in order of a stream of the device."""
    found = opened().host_functions
    assert found is not None, f"{NAME} has none"
    return found


def configure(device: NativeDevice | None, machine: str) -> None:
    """Give a simulated device other rates; others have their own."""
    if device is not None:
        device.configure(**parse(machine).native())


def stream() -> torch.Stream:
    """Make a stream of the device."""
    return torch.Stream(device=WHERE)


def stream_from_a_pair_for_each_expert_on(streamed: StreamedLayers) -> None:
    """Have calls of so many pairs stream their layer, whatever this machine was measured to do."""
    size = streamed.host_of_most().bytes_per_expert
    streamed.rates = StreamRates(fill_bytes_per_s=size, host_pairs_per_s=1)
