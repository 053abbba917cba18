"""Two small simulated devices for these tests, on which nothing takes time unless a test says so.

In a session of their own (``nox -s sim``): a process that uses a simulated device has it as its
accelerator until it ends. What does not need a simulated device can run on another: ``target``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
import torch

from kt_sim import build
from kt_sim.settings import parse

if TYPE_CHECKING:
    from kt_sim.native import NativeDevice

from sim import target


@pytest.fixture(scope="session", autouse=True)
def started() -> NativeDevice | None:
    """The native device; None where it is not simulated."""
    torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other
    if not target.IS_SIM:
        return None
    if why := build.why_not_built():
        pytest.skip(why)
    from kt_sim.device import start

    return start(parse(target.FAST))


@pytest.fixture(autouse=True)
def maybe_device(started: NativeDevice | None) -> Iterator[NativeDevice | None]:
    """The native device, if any; afterwards nothing is lost, slow or waiting."""
    yield started
    if started is not None:
        for index in range(started.device_count()):
            started.revive(index)
            started.synchronize(index)
        started.configure(**parse(target.FAST).native())
    torch.accelerator.set_device_index(0)


@pytest.fixture
def device(maybe_device: NativeDevice | None) -> NativeDevice:
    """The native device, for tests that make it fail or slow."""
    if maybe_device is None:
        pytest.skip("needs a device that is simulated")
    return maybe_device
