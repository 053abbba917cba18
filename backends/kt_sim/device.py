"""The torch device ``sim`` in this process: taking it into use, and what only simulations have."""

from __future__ import annotations

import atexit
import importlib.util
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch.utils import backend_registration

from kt_core.errors import BackendUnavailableError
from kt_sim import build
from kt_sim.native import NativeDevice
from kt_sim.settings import Settings, from_environment

TYPE = "sim"


def in_use() -> NativeDevice | None:
    """Return the compiled device if this process uses it."""
    return cast("NativeDevice | None", sys.modules.get(build.NAME))


def name_device_type() -> None:
    """Let torch know the word ``sim``, of which it knows one besides those of its own.

    Raises:
        BackendUnavailableError: Another package has taken it.
    """
    if why := why_name_is_taken():
        raise BackendUnavailableError(why)
    if torch._C._get_privateuse1_backend_name() != TYPE:
        backend_registration.rename_privateuse1_backend(TYPE)


def why_name_is_taken() -> str | None:
    """Return None unless another package brought torch a device type of its own."""
    taken = torch._C._get_privateuse1_backend_name()
    if taken in {"privateuseone", TYPE}:
        return None
    return (
        f"torch can hold one device type that is not its own, and this process has {taken!r}: "
        f"start one without it (TORCH_DEVICE_BACKEND_AUTOLOAD=0 keeps torch from loading it itself)"
    )


def start(settings: Settings | None = None) -> NativeDevice:
    """Take the device into use: from here on ``sim`` is this process's accelerator.

    Does nothing the second time, except that rates become those of ``settings``.

    Args:
        settings: None for what ``KT_SIM`` says, or what the process uses already.

    Returns:
        The compiled device.

    Raises:
        BackendUnavailableError: It is not compiled, or another package took torch's place for it.
        ValueError: ``settings`` has another number of devices or memory than those in use.
    """
    found = in_use()
    if found is not None:
        if settings is not None:
            found.configure(**settings.native())
        return found
    if why := build.why_not_built():
        msg = f"the simulated device cannot be used: {why}"
        raise BackendUnavailableError(msg)
    settings = settings or from_environment()
    name_device_type()
    device = _import_library()
    device.configure(**settings.native())
    device.register_device()
    torch._register_device_module(TYPE, _torch_module(device))  # type: ignore[no-untyped-call]
    backend_registration.generate_methods_for_privateuse1_backend()
    # Threads of streams must not run operators while torch is taken down.
    atexit.register(_finish, device)
    return device


def current_settings() -> Settings:
    """Return what this process uses, or would if it started now.

    Raises:
        BackendUnavailableError: ``KT_SIM`` is wrong.
    """
    found = in_use()
    return from_environment() if found is None else Settings.of_native(found.settings())


def launch(
    kernel: Callable[..., tuple[float, float, bool]], tensors: Sequence[torch.Tensor], name: str
) -> None:
    """Put a kernel into the current stream of the tensors' device; does not wait.

    Args:
        kernel: Called by the stream's thread with a tensor on the host for each of ``tensors``,
            over the same bytes; writes its results there. Returns the bytes of device memory it
            would move, the operations it would do, and whether those are of 16 bit.
        tensors: At least one, all on one simulated device. They are not kept alive.
        name: For errors: what the kernel raises loses the device.
    """
    start().launch(kernel, list(tensors), name)


def _import_library() -> NativeDevice:
    spec = importlib.util.spec_from_file_location(build.NAME, build.library_path())
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[build.NAME] = module  # the process's one: a second copy could not register
    spec.loader.exec_module(module)
    return cast("NativeDevice", module)


def _torch_module(device: NativeDevice) -> types.ModuleType:
    """Make ``torch.sim``: what torch expects of the module of a device type."""
    module = types.ModuleType(f"torch.{TYPE}")

    def index_of(where: Any = None) -> int:
        if where is None:
            return device.current_device()
        if isinstance(where, int):
            return where
        named = torch.device(where)
        return device.current_device() if named == torch.device(TYPE) else named.index

    def generator(where: Any = None) -> torch.Generator:
        return device.default_generator(index_of(where))

    def manual_seed_all(seed: int) -> None:
        for index in range(device.device_count()):
            generator(index).manual_seed(seed)

    def set_rng_state(state: torch.Tensor, where: Any = None) -> None:
        generator(where).set_state(state)

    def get_device_properties(where: Any = None) -> types.SimpleNamespace:
        _, total = torch.accelerator.get_memory_info(index_of(where))
        return types.SimpleNamespace(name="simulated accelerator", total_memory=total)

    functions: dict[str, Any] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_is_in_bad_fork": lambda: False,
        "device_count": device.device_count,
        "current_device": device.current_device,
        "set_device": lambda where: device.set_device(index_of(where)),
        "synchronize": lambda where=None: device.synchronize(index_of(where)),
        "manual_seed": lambda seed: generator().manual_seed(seed),
        "manual_seed_all": manual_seed_all,
        "get_rng_state": lambda where=None: generator(where).get_state(),
        "set_rng_state": set_rng_state,
        "get_amp_supported_dtype": lambda: [torch.bfloat16, torch.float16],
        "get_device_properties": get_device_properties,
    }
    for name, function in functions.items():
        setattr(module, name, function)
    return module


def _finish(device: NativeDevice) -> None:
    for index in range(device.device_count()):
        try:
            device.synchronize(index)
        except RuntimeError:  # lost, or in the middle of a capture: nothing is left to wait for
            continue
