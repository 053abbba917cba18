"""What the backends for accelerators say of a machine: each reason; asking starts nothing."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kt_core import hardware, plugins
from kt_core.accelerator import TorchBackend
from kt_core.errors import BackendUnavailableError, DeviceError, UnsupportedFormatError
from kt_core.hardware import Accelerator, runtime_library
from kt_core.interfaces import Backend
from kt_core.packed import LinearLayout
from kt_core.quant import BUILT_IN_FORMATS
from kt_core.types import ActivationPrecision, DeviceInfo, LinearSpec, MoeSpec
from kt_cuda import CudaBackend, stream_memory
from kt_npu import NpuBackend
from kt_rocm import RocmBackend
from kt_triton.backend import TritonBackend
from kt_xpu import XpuBackend

SPEC = MoeSpec(num_experts=2, hidden_size=128, intermediate_size=64)
DENSE = LinearSpec(in_features=128, out_features=64)
FORMATS = {f.descriptor.name: f.descriptor for f in BUILT_IN_FORMATS}
BACKENDS: list[TorchBackend] = [CudaBackend(), RocmBackend(), XpuBackend(), NpuBackend()]


def reason(backend: Backend) -> str:
    """Return why it cannot run; fail if it can."""
    why = backend.why_unavailable()
    assert why is not None
    return why


def lacks(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    """Let a module be missing, or, with a ``+`` before it, be there."""
    find = importlib.util.find_spec
    name, found = module.lstrip("+"), SimpleNamespace() if module.startswith("+") else None
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda asked, *rest: found if asked == name else find(asked)
    )


def test_all_are_registered() -> None:
    """By entry points, as a vendor's own would be."""
    names = {backend.name for backend in BACKENDS}
    assert names <= set(plugins.load().backends.names())


@pytest.mark.skipif(torch.accelerator.is_available(), reason="this machine has an accelerator")
@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.name)
def test_this_machine(backend: TorchBackend) -> None:
    """A CPU build of torch: each says so, and what to install; nothing is started by asking."""
    for _ in range(2):
        assert "install" in reason(backend)
    assert not torch.cuda.is_initialized()


def test_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Build, driver, device, Triton: in the order in which they must be mended."""
    backend = CudaBackend()
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "not built for CUDA" in reason(backend)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr("kt_cuda.backend.DRIVER", "libkt-no-such-driver.so.1")
    assert "libkt-no-such-driver.so.1 cannot be loaded" in reason(backend)
    monkeypatch.setattr("kt_cuda.backend.DRIVER", "libc.so.6")  # one that is there
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert "shows no GPU: see" in reason(backend)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    assert "CUDA_VISIBLE_DEVICES=7 may hide" in reason(backend)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    lacks(monkeypatch, "triton")
    assert "pip install 'kt-core[cuda]'" in reason(backend)
    lacks(monkeypatch, "+triton")
    assert backend.why_unavailable() is None


def test_rocm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The same, where the driver is a file that must be there and be ours to open."""
    backend = RocmBackend()
    monkeypatch.setattr(torch.version, "hip", None)
    assert "not built for ROCm" in reason(backend)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    driver = tmp_path / "kfd"
    monkeypatch.setattr("kt_rocm.backend.DRIVER_FILE", driver)
    assert "is missing" in reason(backend)
    driver.mkdir()  # what nobody can open for writing, root included
    assert "cannot be opened" in reason(backend)
    driver.rmdir()
    driver.touch()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setenv("HIP_VISIBLE_DEVICES", "")
    assert "HIP_VISIBLE_DEVICES= may hide" in reason(backend)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    lacks(monkeypatch, "+triton")
    assert backend.why_unavailable() is None


def test_xpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Build, driver, device; Triton is not needed, but widens what can be computed."""
    backend = XpuBackend()
    monkeypatch.setattr(torch.version, "xpu", None)
    assert "not built for XPU" in reason(backend)
    monkeypatch.setattr(torch.version, "xpu", "2026.0")
    monkeypatch.setattr("kt_xpu.backend.RENDER_NODES", tmp_path)
    assert "renderD* is missing" in reason(backend)
    (tmp_path / "renderD128").touch()
    monkeypatch.setattr(torch.xpu, "device_count", lambda: 0)
    assert "shows no GPU" in reason(backend)
    monkeypatch.setattr(torch.xpu, "device_count", lambda: 1)
    assert backend.why_unavailable() is None
    monkeypatch.setattr("kt_xpu.backend.triton_knows_xpu", lambda: False)
    assert backend.what_it_computes().formats <= set(FORMATS)
    assert not backend.what_it_computes().computes(FORMATS["mxfp4"])
    monkeypatch.setattr("kt_xpu.backend.triton_knows_xpu", lambda: True)
    assert backend.what_it_computes().computes(FORMATS["mxfp4"])


def test_npu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """torch-npu, driver, and that torch has loaded the one with the other."""
    backend = NpuBackend()
    lacks(monkeypatch, "torch_npu")
    assert "torch-npu is not installed" in reason(backend)
    lacks(monkeypatch, "+torch_npu")
    monkeypatch.setattr("kt_npu.backend.DEVICES", tmp_path)
    assert "davinci* is missing" in reason(backend)
    (tmp_path / "davinci_manager").touch()  # is there without an NPU too
    assert "davinci* is missing" in reason(backend)
    (tmp_path / "davinci0").touch()
    assert "torch has not loaded torch-npu" in reason(backend)
    monkeypatch.setattr(torch._C, "_get_privateuse1_backend_name", lambda: "npu")
    assert backend.why_unavailable() is None
    assert backend.what_it_computes().formats <= set(FORMATS)


@pytest.fixture
def two_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torch list two devices of each type."""

    def detect() -> tuple[Accelerator, ...]:
        return tuple(
            Accelerator(device=f"{kind}:{index}", name=f"{kind} {index}", memory_bytes=1 << 34)
            for kind in ("cuda", "xpu", "npu")
            for index in range(2)
        )

    monkeypatch.setattr(hardware, "detect_accelerators", detect)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    properties = SimpleNamespace(gcnArchName="gfx942:sramecc+:xnack-")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)


@pytest.mark.usefixtures("two_devices")
@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.name)
def test_devices(backend: TorchBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are torch's, under the backend's name; opening one says what it lacks."""
    monkeypatch.setattr(backend.__class__, "host_functions", lambda self, device: None)
    devices = backend.devices()
    assert [device.name for device in devices] == [f"{backend.name}:{i}" for i in (0, 1)]
    assert {d.torch_device.partition(":")[0] for d in devices} == {backend.device_type}
    with pytest.raises(BackendUnavailableError, match=f"torch lists {backend.name}:0"):
        backend.open(f"{backend.name}:2")
    with backend.open(f"{backend.name}:1") as device:
        assert device.capabilities == backend.capabilities(device.info.name)
        assert device.expert_bytes(SPEC, FORMATS["bf16"]) >= 2 * SPEC.weights_per_expert
        with pytest.raises(UnsupportedFormatError, match="no int8 activations"):
            device.expert_kernel(SPEC, FORMATS["bf16"], precision=ActivationPrecision.INT8)
        assert device.capabilities.computes_dense == isinstance(backend, TritonBackend)
        if device.capabilities.computes_dense:
            packed = LinearLayout.of(DENSE, FORMATS["int4-g32"]).size_bytes
            assert device.linear_bytes(DENSE, FORMATS["int4-g32"]) == packed
    with pytest.raises(RuntimeError, match="closed"):
        device.expert_kernel(SPEC, FORMATS["bf16"])


@pytest.mark.usefixtures("two_devices")
def test_devices_that_are_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    """Said when one is opened: finding out starts the runtime."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(BackendUnavailableError, match=r"compute capability is 7\.5"):
        CudaBackend().open("cuda:0")
    properties = SimpleNamespace(gcnArchName="gfx1030")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    with pytest.raises(BackendUnavailableError, match="it is a gfx1030"):
        RocmBackend().open("rocm:0")


@pytest.mark.usefixtures("two_devices")
def test_no_host_functions(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A runtime without them is told of, and the device can be used."""

    def missing(self: Any, device: DeviceInfo) -> None:
        msg = "cudaLaunchHostFunc is nowhere"
        raise DeviceError(msg)

    monkeypatch.setattr(CudaBackend, "host_functions", missing)
    assert CudaBackend().open("cuda:0").host_functions is None
    assert "cudaLaunchHostFunc is nowhere" in caplog.text


@pytest.mark.usefixtures("two_devices")
def test_cuda_rings_a_doorbell_or_else_asks_its_runtime(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Which of the two it is, is in the log of those who want to know."""
    runtime = object()
    monkeypatch.setattr(runtime_library, "RuntimeHostFunctions", lambda *_: runtime)
    monkeypatch.setattr("kt_cuda.backend.DRIVER", "libc.so.6")
    caplog.set_level("INFO", "kt_cuda")
    assert CudaBackend().host_functions(CudaBackend().devices()[0]) is runtime
    assert "NVIDIA's driver has no cuStreamWriteValue32_v2" in caplog.text
    monkeypatch.setattr("kt_cuda.backend.DRIVER", "libnobody.so")
    assert CudaBackend().host_functions(CudaBackend().devices()[0]) is runtime
    assert "libnobody.so cannot be loaded" in caplog.text
    monkeypatch.setattr("kt_cuda.backend._doorbell", lambda device: device.torch_device)
    assert CudaBackend().host_functions(CudaBackend().devices()[1]) == "cuda:1"


def test_what_a_stream_of_cuda_does_to_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recorded calls: the driver's two functions, with their flags, and an error's code."""
    calls: list[tuple[Any, ...]] = []

    def function(_: Any, name: str) -> Any:
        def call(*arguments: Any) -> int:
            calls.append((name, *arguments))
            return 700 if arguments[2] == 9 else 0

        call.__name__ = name
        return call

    monkeypatch.setattr(stream_memory, "_function", function)
    memory = stream_memory.CudaStreamMemory("libc.so.6")
    stream: Any = SimpleNamespace(native_handle=5, device="cuda:0")
    memory.write(stream, 4096, 0)
    memory.wait(stream, 4100, 3)
    assert calls == [
        ("cuStreamWriteValue32_v2", 5, 4096, 0, 0),
        ("cuStreamWaitValue32_v2", 5, 4100, 3, 1),
    ]
    with pytest.raises(DeviceError, match="cuStreamWriteValue32_v2 refused on cuda:0: code 700"):
        memory.write(stream, 4096, 9)


@pytest.mark.parametrize("backend", [XpuBackend(), NpuBackend()], ids=lambda b: b.name)
def test_shapes_that_a_vendors_operators_refuse(
    backend: TorchBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Partial groups are refused when the layer is made."""
    monkeypatch.setattr("kt_xpu.backend.triton_knows_xpu", lambda: False)
    host = torch.device("cpu")
    with pytest.raises(UnsupportedFormatError, match="multiple of 128"):
        backend.kernel(host, SPEC, FORMATS["int4-g128"], ActivationPrecision.AUTO)
    kernel = backend.kernel(host, SPEC, FORMATS["int4-g64"], ActivationPrecision.AUTO)
    assert kernel.bytes_per_expert == backend.expert_bytes(SPEC, FORMATS["int4-g64"])


@pytest.mark.usefixtures("two_devices")
def test_formats_without_an_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused in the words that name what there is."""
    monkeypatch.setattr("kt_xpu.backend.triton_knows_xpu", lambda: False)
    with (
        XpuBackend().open("xpu:0") as device,
        pytest.raises(UnsupportedFormatError, match="cannot compute format 'fp8'"),
    ):
        device.expert_kernel(SPEC, FORMATS["fp8"])
