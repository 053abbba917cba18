"""Accelerators, as far as torch sees them. No vendor is asked by name: torch knows the device type.

https://docs.pytorch.org/docs/stable/accelerator.html
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Accelerator:
    """A device with its own memory.

    Attributes:
        device: What ``torch.device`` takes, index included, such as ``cuda:0``.
        name: Marketing name, or the device type where the driver gives none.
        memory_bytes: Installed on the device, in bytes.
    """

    device: str
    name: str
    memory_bytes: int


def detect_accelerators() -> tuple[Accelerator, ...]:
    """Describe the devices of the accelerator that torch was built for.

    Does not raise: a device that fails to answer is logged and left out. Where there is a device,
    asking for its properties starts the vendor's runtime, after which a forked child cannot use
    the device; without one nothing is started.
    """
    import torch  # seconds, and not needed for anything else in this package

    kind = torch.accelerator.current_accelerator()
    if kind is None:
        return ()
    try:
        count = torch.accelerator.device_count()
    except Exception:  # a vendor's module may raise anything
        logger.warning("%s devices cannot be counted and are ignored", kind.type, exc_info=True)
        return ()
    found = []
    for index in range(count):
        device = torch.device(kind.type, index)
        try:
            found.append(_describe(device))
        except Exception:  # as above; the other devices may still work
            logger.warning("%s does not say what it is and is ignored", device, exc_info=True)
    return tuple(found)


def _describe(device: torch.device) -> Accelerator:
    import torch

    module = torch.get_device_module(device)
    properties = None
    if hasattr(module, "get_device_properties"):
        properties = module.get_device_properties(device.index)
    memory_bytes = getattr(properties, "total_memory", None)
    if memory_bytes is None:  # the second choice: it makes a context on the device
        _, memory_bytes = torch.accelerator.get_memory_info(device)
    name = getattr(properties, "name", None) or device.type
    return Accelerator(device=str(device), name=str(name), memory_bytes=int(memory_bytes))
