"""A machine as a user describes it, on the command line or in a YAML file, and what becomes of it.

host:
  memory: 512GiB
  bandwidth: 200GB/s
  cores: 32
  int8: 30TOP/s         # optional, as all that follows
  bf16: 15TFLOP/s
accelerator:
  count: 2
  memory: 24GiB
  bandwidth: 1008GB/s
  bf16: 165TFLOP/s
  link: 31.5GB/s
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from kt_core import hardware
from kt_core.errors import InvalidRequestError
from kt_core.plan.machine import Card, HostRates, Machine, described_rates
from kt_core.plan.units import gigabytes, parse_bytes, parse_bytes_per_s, parse_ops_per_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """What was said about a machine; None for what was not.

    Attributes:
        memory_bytes: Of the host.
        cores: Physical ones.
        read_bytes_per_s: Of host memory.
        int8_ops_per_s: Of all cores.
        bf16_ops_per_s: Of all cores.
        card_count: Accelerators.
        card_memory_bytes: Of each; 0 to plan without the one that is here.
        card_read_bytes_per_s: Of each.
        card_ops_per_s: Of each, bf16.
        link_bytes_per_s: From the host to each.
    """

    memory_bytes: int | None = None
    cores: int | None = None
    read_bytes_per_s: float | None = None
    int8_ops_per_s: float | None = None
    bf16_ops_per_s: float | None = None
    card_count: int | None = None
    card_memory_bytes: int | None = None
    card_read_bytes_per_s: float | None = None
    card_ops_per_s: float | None = None
    link_bytes_per_s: float | None = None

    def overridden_by(self, other: Description) -> Description:
        """Return this, with what ``other`` says instead where it says something."""
        said = {f.name: getattr(other, f.name) for f in fields(other)}
        return replace(self, **{name: value for name, value in said.items() if value is not None})


def _count(value: object, what: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        msg = f"{what} must be a whole number above 0, got {value!r}"
        raise InvalidRequestError(msg)
    return value


def _quantity(parse: Callable[[str, str], float]) -> Callable[[object, str], float]:
    def parsed(value: object, what: str) -> float:
        # A number without a unit is told the same as text that is none.
        return parse(value if isinstance(value, str) else repr(value), what)

    return parsed


_KEYS: Mapping[str, Mapping[str, tuple[str, Callable[[object, str], Any]]]] = {
    "host": {
        "memory": ("memory_bytes", _quantity(parse_bytes)),
        "bandwidth": ("read_bytes_per_s", _quantity(parse_bytes_per_s)),
        "cores": ("cores", _count),
        "int8": ("int8_ops_per_s", _quantity(parse_ops_per_s)),
        "bf16": ("bf16_ops_per_s", _quantity(parse_ops_per_s)),
    },
    "accelerator": {
        "count": ("card_count", _count),
        "memory": ("card_memory_bytes", _quantity(parse_bytes)),
        "bandwidth": ("card_read_bytes_per_s", _quantity(parse_bytes_per_s)),
        "bf16": ("card_ops_per_s", _quantity(parse_ops_per_s)),
        "link": ("link_bytes_per_s", _quantity(parse_bytes_per_s)),
    },
}


def read_description(file: Path) -> Description:
    """Return what a YAML file says about a machine.

    Raises:
        InvalidRequestError: It cannot be read, or says something that is not understood.
    """
    import yaml  # type: ignore[import-untyped]  # has no types of its own

    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        msg = f"--machine {file} cannot be read: {error.strerror or error}"
        raise InvalidRequestError(msg) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        msg = f"--machine {file} is no YAML: {' '.join(str(error).split())}"
        raise InvalidRequestError(msg) from error
    values: dict[str, Any] = {}
    for section, entries in _mapping(content, str(file), _KEYS).items():
        where = f"{section} in {file}"
        for key, value in _mapping(entries, where, _KEYS[section]).items():
            name, parse = _KEYS[section][key]
            values[name] = parse(value, f"{key} of {where}")
    if "card_memory_bytes" not in values and any(n.startswith(("card", "link")) for n in values):
        msg = f"accelerator in {file} must say its memory, such as memory: 24GiB"
        raise InvalidRequestError(msg)
    return Description(**values)


def _mapping(content: object, where: str, known: Mapping[str, object]) -> Mapping[str, Any]:
    if not isinstance(content, dict):
        msg = f"{where} must hold {', '.join(known)}, got {type(content).__name__}"
        raise InvalidRequestError(msg)
    if unknown := [str(key) for key in content if key not in known]:
        msg = f"{where} says {', '.join(unknown)}, which is not known; known: {', '.join(known)}"
        raise InvalidRequestError(msg)
    return content


def is_this_machine(description: Description) -> bool:
    """Whether the host's speed is that of the machine at hand."""
    return description.read_bytes_per_s is None and description.cores is None


def machine_of(description: Description, measured: Callable[[], HostRates]) -> Machine:
    """Return the machine that a plan is for: what was said, else what is here.

    Args:
        description: What was said.
        measured: Measures this host; called where its speed matters.

    Raises:
        InvalidRequestError: What was said does not suffice.
    """
    here = hardware.detect()
    assumptions: list[str] = []
    cores = description.cores or here.cpu.usable_threads
    if is_this_machine(description):
        rates = measured()
    else:
        if description.read_bytes_per_s is None:
            msg = (
                "the memory bandwidth of a machine with other cores is not known: "
                "--bandwidth, such as --bandwidth 200GB/s"
            )
            raise InvalidRequestError(msg)
        if description.cores is None:
            assumptions.append(f"as many cores as here, {cores}: --cores")
        if description.int8_ops_per_s is None:
            assumptions.append("cores as fast as those our kernels were measured on, AVX-512 VNNI")
        rates = described_rates(
            read_bytes_per_s=description.read_bytes_per_s,
            cores=cores,
            int8_ops_per_s=description.int8_ops_per_s,
            bf16_ops_per_s=description.bf16_ops_per_s,
        )
    memory = description.memory_bytes
    if memory is None:
        memory = here.memory.available_bytes
        if not is_this_machine(description):
            assumptions.append(f"as much memory as is free here, {gigabytes(memory)}: --ram")
    return Machine(
        memory_bytes=memory,
        cores=cores,
        host=rates,
        card=_card(description, here, assumptions),
        assumptions=tuple(assumptions),
    )


def _card(description: Description, here: hardware.Hardware, assumptions: list[str]) -> Card | None:
    size = description.card_memory_bytes
    count = description.card_count or 1
    if size is None and is_this_machine(description) and here.accelerators:
        size = min(accelerator.memory_bytes for accelerator in here.accelerators)
        count = len(here.accelerators)
    if not size:
        return None
    card = Card(count=count, memory_bytes=size)
    said = {
        "read_bytes_per_s": description.card_read_bytes_per_s,
        "ops_per_s": description.card_ops_per_s,
        "link_bytes_per_s": description.link_bytes_per_s,
    }
    words = {
        "read_bytes_per_s": f"accelerator memory read at {gigabytes(card.read_bytes_per_s)}/s",
        "ops_per_s": f"accelerator of {card.ops_per_s / 1e12:.0f} TFLOP/s in bf16",
        "link_bytes_per_s": f"link of {gigabytes(card.link_bytes_per_s)}/s to the accelerator",
    }
    assumptions += [words[name] for name, value in said.items() if value is None]
    if description.card_memory_bytes:
        assumptions.append("an accelerator that computes packed dense layers: NVIDIA's or AMD's")
    assumptions.append("80 % of the accelerator's bandwidth and 50 % of its peak are reached")
    rates: dict[str, Any] = {name: value for name, value in said.items() if value is not None}
    return replace(card, **rates)
