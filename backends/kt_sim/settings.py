"""What is simulated: devices, memory, link and rates; from ``KT_SIM``, a file, or the caller.

The defaults are a GeForce RTX 4090 (NVIDIA Ada GPU architecture whitepaper, appendix A: 24 GB at
1008 GB/s, 82.6 TFLOP/s in float32, 165.2 in float16 with float32 accumulation) on a link of
25 GB/s, of the 31.5 GB/s that PCIe 4.0 x16 has. The link's latency is a round number.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from kt_core.errors import BackendUnavailableError

VARIABLE = "KT_SIM"

_MAX_DEVICES = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """A simulated machine. A rate of 0 stands for "takes no time".

    Attributes:
        devices: How many devices, 1 to 16.
        memory_gib: Memory of each, in GiB.
        link_gb_s: Link between host and device, each direction, in 10^9 bytes/s.
        link_latency_us: Of each transfer, in microseconds.
        memory_gb_s: Bandwidth of the device's memory, in 10^9 bytes/s.
        float32_tflops: 10^12 operations/s in float32; a multiply-add is two.
        float16_tflops: The same with float16 or bfloat16 operands.
    """

    devices: int = 1
    memory_gib: float = 24
    link_gb_s: float = 25
    link_latency_us: float = 10
    memory_gb_s: float = 1008
    float32_tflops: float = 82.6
    float16_tflops: float = 165.2

    def __post_init__(self) -> None:
        if self.devices != int(self.devices) or not 1 <= self.devices <= _MAX_DEVICES:
            msg = f"devices must be a whole number in 1..{_MAX_DEVICES}, got {self.devices}"
            raise ValueError(msg)
        if not self.memory_gib > 0:
            msg = f"memory_gib must be > 0, got {self.memory_gib}"
            raise ValueError(msg)
        for field in fields(self):
            if not 0 <= getattr(self, field.name) < float("inf"):
                msg = f"{field.name} must be >= 0 and finite, got {getattr(self, field.name)}"
                raise ValueError(msg)

    @property
    def memory_bytes(self) -> int:
        """Memory of one device, in bytes."""
        return int(self.memory_gib * 2**30)

    def native(self) -> dict[str, Any]:
        """Return the arguments of ``_device.configure``: bytes, seconds, operations per second."""
        return {
            "devices": int(self.devices),
            "memory_bytes": self.memory_bytes,
            "link_bytes_per_s": self.link_gb_s * 1e9,
            "link_latency_s": self.link_latency_us * 1e-6,
            "memory_bytes_per_s": self.memory_gb_s * 1e9,
            "float32_flops_per_s": self.float32_tflops * 1e12,
            "float16_flops_per_s": self.float16_tflops * 1e12,
        }

    @classmethod
    def of_native(cls, values: Mapping[str, float]) -> Settings:
        """Invert ``native``."""
        return cls(
            devices=int(values["devices"]),
            memory_gib=values["memory_bytes"] / 2**30,
            link_gb_s=values["link_bytes_per_s"] / 1e9,
            link_latency_us=values["link_latency_s"] * 1e6,
            memory_gb_s=values["memory_bytes_per_s"] / 1e9,
            float32_tflops=values["float32_flops_per_s"] / 1e12,
            float16_tflops=values["float16_flops_per_s"] / 1e12,
        )


def from_environment() -> Settings:
    """Return what ``KT_SIM`` says: ``devices=2,memory_gib=1``, or a YAML file of the same names.

    Raises:
        BackendUnavailableError: The file cannot be read, or a name or a number is wrong.
    """
    said = os.environ.get(VARIABLE, "").strip()
    try:
        return parse(said)
    except (ValueError, OSError) as error:
        known = ", ".join(field.name for field in fields(Settings))
        msg = (
            f"{VARIABLE}={said!r} does not describe a simulated machine: {error}; write "
            f"name=number,... or the path of a YAML file, with names among {known}"
        )
        raise BackendUnavailableError(msg) from error


def parse(said: str) -> Settings:
    """Read ``name=number,...``, or the YAML file of that name.

    Raises:
        ValueError: A name or a number is wrong, or the file is no YAML.
        OSError: The file cannot be read.
    """
    is_file = said.endswith((".yaml", ".yml"))
    values = _read_file(Path(said)) if is_file else _read_pairs(said)
    known = {field.name for field in fields(Settings)}
    if unknown := sorted(map(str, values.keys() - known)):
        msg = f"there is no setting {', '.join(unknown)}"
        raise ValueError(msg)
    numbers: dict[str, Any] = {}
    for name, value in values.items():
        try:
            number = float(value)
        except (TypeError, ValueError):
            msg = f"{name} must be a number, got {value!r}"
            raise ValueError(msg) from None
        numbers[name] = int(number) if name == "devices" and number.is_integer() else number
    return Settings(**numbers)


def _read_pairs(said: str) -> dict[str, Any]:
    values = {}
    for part in filter(None, (part.strip() for part in said.split(","))):
        name, equals, number = part.partition("=")
        if not equals:
            msg = f"{part!r} has no '='"
            raise ValueError(msg)
        values[name.strip()] = number
    return values


def _read_file(path: Path) -> dict[str, Any]:
    # Most processes that register this backend never need it. It comes without types.
    import yaml  # type: ignore[import-untyped]

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        msg = f"{path} is no YAML: {error}"
        raise ValueError(msg) from error
    if not isinstance(values, dict):
        msg = f"{path} must hold names and numbers"
        raise ValueError(msg)  # noqa: TRY004  # the user wrote it
    return values
