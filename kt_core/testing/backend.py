"""The contract of ``kt_core.interfaces.Backend``, as tests."""

from __future__ import annotations

import re

import pytest
import torch

from kt_core.errors import UnsupportedFormatError
from kt_core.quant import BUILT_IN_FORMATS
from kt_core.testing.backend_dense import BackendDense
from kt_core.testing.backend_harness import SPEC, BackendHarness, precisions
from kt_core.testing.backend_numbers import BackendNumbers
from kt_core.testing.backend_packed import PackedRules
from kt_core.testing.backend_rules import LoadingRules, SubmittingRules
from kt_core.testing.backend_training import BackendTraining
from kt_core.types import Element, Format, ScaleType

NAME = re.compile(r"[a-z][a-z0-9_]*")


class BackendFacts(BackendHarness):
    """Part of ``BackendContract``: what a backend says about itself."""

    def test_name(self) -> None:
        """A lower-case word of its own; a whole number as preference."""
        assert NAME.fullmatch(self.backend.name), f"{self.backend.name!r} is no lower-case word"
        assert self.backend.name != "auto", "'auto' means: whichever is best"
        assert type(self.backend.preference) is int

    def test_why_unavailable(self) -> None:
        """None or a reason; asking does not raise and does not change the answer."""
        reason = self.backend.why_unavailable()
        assert reason is None or reason.strip()
        assert self.backend.why_unavailable() == reason

    def test_devices(self) -> None:
        """At least one, named after the backend: ``name`` or ``name:something``."""
        self.info()  # skips where the backend cannot run
        devices = self.backend.devices()
        names = [device.name for device in devices]
        assert len(set(names)) == len(names), f"two devices have one name: {names}"
        for device in devices:
            # Registry.find_device tells by this whose reason to print.
            assert device.name.partition(":")[0] == self.backend.name
            assert device.description.strip()
            assert device.memory_bytes > 0
            torch.device(device.torch_device)
        assert list(self.backend.devices()) == list(devices)

    def test_capabilities(self) -> None:
        """It computes something, and every format it names is a registered one."""
        capabilities = self.backend.capabilities(self.info().name)
        known = {f.descriptor.name for f in (*BUILT_IN_FORMATS, *self.formats)}
        assert any(capabilities.computes(f.descriptor) for f in self.formats)
        assert capabilities.formats <= known, f"unknown: {sorted(capabilities.formats - known)}"

    def test_open(self) -> None:
        """The open device says the same of itself; closing twice does nothing."""
        info = self.info()
        for threads in (1, 2, None):
            device = self.backend.open(info.name, threads=threads)
            assert device.info == info
            assert device.capabilities == self.backend.capabilities(info.name)
            assert device.threads >= 1
            assert threads is None or device.threads <= threads
            device.close()
            device.close()

    def test_two_devices_at_once(self) -> None:
        """Each engine opens its own: closing one leaves the other alone."""
        weight_format = self.computed_formats()[0]
        first, second = self.open(), self.open()
        first.close()
        with second:
            assert precisions(second, SPEC, weight_format)

    def test_refuses_formats_it_does_not_compute(self) -> None:
        """With ``UnsupportedFormatError``, which the user sees."""
        elements = self.backend.capabilities(self.info().name).elements
        if not (left := [e for e in Element if e not in elements]):
            pytest.skip("the device computes every element")
        scale = None if left[0] is Element.BF16 else ScaleType.BF16
        unknown = Format(name="contract-unknown", element=left[0], scale=scale)
        with self.open() as device:
            message = ""
            try:
                device.expert_kernel(SPEC, unknown)
            except UnsupportedFormatError as error:
                message = str(error)
            assert unknown.name in message, (
                f"must raise UnsupportedFormatError that names the format, got {message!r}"
            )


class BackendContract(
    BackendFacts,
    BackendNumbers,
    BackendTraining,
    LoadingRules,
    PackedRules,
    SubmittingRules,
    BackendDense,
):
    """What every backend must do. Subclass it in a test file and name the backend::

        class TestMyBackend(BackendContract):
            backend = MyBackend()

    Where the backend cannot run, its tests skip and say why. See ``BackendHarness`` for the other
    attributes.
    """
