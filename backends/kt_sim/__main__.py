"""``python -m kt_sim``: compile the simulated device, and say where it lies."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.progress import Progress

from kt_core.errors import BackendUnavailableError
from kt_sim import build


def main() -> int:
    """Return the exit code: 0 if the device is compiled, 1 if it cannot be."""
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    try:
        with Progress(console=console, transient=True) as progress:
            task = progress.add_task("compiling the simulated device", total=None)
            path = build.build(
                lambda done, total: progress.update(task, completed=done, total=total)
            )
    except BackendUnavailableError as error:
        console.print(f"error: {error}", markup=False)
        return 1
    Console(soft_wrap=True, highlight=False).print(str(path), markup=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
