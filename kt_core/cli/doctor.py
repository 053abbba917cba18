"""``kt doctor``: what can run here, and why the rest cannot."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.markup import escape

from kt_core import hardware
from kt_core.cli.backends import describe_backends
from kt_core.cli.output import JSON_HELP, complain, print_json, registry_of, show, table
from kt_core.cli.version import versions

EPILOG = """
Examples:

* `kt doctor`
* `kt doctor --json | jq .cpu.features`
"""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(epilog=EPILOG)(doctor)


def doctor(
    context: typer.Context,
    as_json: Annotated[bool, typer.Option("--json", help=JSON_HELP)] = False,
) -> None:
    """Say what this machine offers, which backends can run, and why the others cannot.

    Exits with 1 if none can.
    """
    machine = hardware.detect()
    backends = describe_backends(registry_of(context))
    report = {**_machine(machine), "backends": backends, "versions": versions()}
    if as_json:
        print_json(report)
    else:
        _show(report)
    if not any(backend["available"] for backend in backends):
        complain("error", "no backend can run here, so no model can")
        raise typer.Exit(1)


def _machine(machine: hardware.Hardware) -> dict[str, Any]:
    cpu = machine.cpu
    return {
        "cpu": {
            "name": cpu.name,
            "architecture": cpu.architecture,
            "features": sorted(cpu.features),
            "physical_cores": len(cpu.physical_cores),
            "logical_cpus": len(cpu.logical_cpus),
            "cgroup_cpus": cpu.cgroup_cpus,
            "usable_threads": cpu.usable_threads,
            "numa_nodes": [asdict(node) for node in cpu.numa_nodes],
        },
        "memory": asdict(machine.memory),
        "accelerators": [asdict(accelerator) for accelerator in machine.accelerators],
    }


def _show(report: dict[str, Any]) -> None:
    cpu, memory = report["cpu"], report["memory"]
    rows = table()
    rows.add_row("cpu", cpu["name"])
    threads = f"{cpu['usable_threads']} (of {cpu['physical_cores']} physical cores"
    quota = cpu["cgroup_cpus"]
    rows.add_row("threads", f"{threads}{'' if quota is None else f', {quota:g} allowed'})")
    rows.add_row("features", " ".join(cpu["features"]))
    rows.add_row("NUMA nodes", str(len(cpu["numa_nodes"])))
    free, total = memory["available_bytes"] / 1e9, memory["total_bytes"] / 1e9
    rows.add_row("memory", f"{free:.1f} GB available of {total:.1f} GB")
    for accelerator in report["accelerators"]:
        size = accelerator["memory_bytes"] / 1e9
        rows.add_row(accelerator["device"], f"{accelerator['name']}, {size:.1f} GB")
    if not report["accelerators"]:
        rows.add_row("accelerator", "none that torch can use")
    for backend in report["backends"]:
        rows.add_row(f"backend {backend['name']}", _state(backend))
        for device in backend["devices"]:
            for remark in device["remarks"]:
                rows.add_row("remark", f"{device['name']}: {remark}")
    rows.add_row("versions", ", ".join(f"{name} {v}" for name, v in report["versions"].items()))
    show(rows)


def _state(backend: dict[str, Any]) -> str:
    """Say whether a backend can run, and on what."""
    if not backend["available"]:
        return f"cannot run: {escape(backend['why_unavailable'])}"
    states = []
    for device in backend["devices"]:
        state = f"ready: {device['name']}"
        if device["isa"]:
            others = [isa for isa in device["isas"] if isa != device["isa"]]
            state += f" with {device['isa']}"
            state += f" (also {', '.join(others)})" if others else ""
        states.append(state)
    return "; ".join(states)
