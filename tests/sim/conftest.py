"""Two small simulated devices for these tests, on which nothing takes time unless a test says so.

In a session of their own (``nox -s sim``): a process that uses a simulated device has it as its
accelerator until it ends.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from kt_sim import build
from kt_sim.native import NativeDevice
from kt_sim.settings import VARIABLE, parse

MACHINE = (
    "devices=2,memory_gib=0.25,link_gb_s=0,link_latency_us=0,memory_gb_s=0,"
    "float32_tflops=0,float16_tflops=0"
)
# Here, and not in a fixture: the contract suite asks for the devices while tests are collected.
os.environ.setdefault(VARIABLE, MACHINE)


@pytest.fixture(scope="session", autouse=True)
def started() -> NativeDevice:
    if why := build.why_not_built():
        pytest.skip(why)
    from kt_sim.device import start

    torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other
    return start(parse(MACHINE))


@pytest.fixture(autouse=True)
def device(started: NativeDevice) -> Iterator[NativeDevice]:
    """The native device; afterwards nothing is lost, slow or waiting."""
    yield started
    for index in range(started.device_count()):
        started.revive(index)
        started.synchronize(index)
    started.configure(**parse(MACHINE).native())
    torch.accelerator.set_device_index(0)
