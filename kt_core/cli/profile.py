"""``kt run --profile``: where the time went, as a Chrome trace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from kt_core.cli.output import OutputError, remark
from kt_core.errors import InvalidRequestError

if TYPE_CHECKING:
    from kt_core.engine import Engine
    from kt_core.engine.profiler import Profiler


def check_target(target: Path | None) -> None:
    """Refuse a file that cannot be written, before a model is loaded for it.

    Raises:
        InvalidRequestError: Its folder is absent, or it is a folder.
    """
    if target is None:
        return
    if target.is_dir():
        msg = f"--profile {target} is a folder: name a file in it, such as {target / 'run.json'}"
        raise InvalidRequestError(msg)
    if not target.parent.is_dir():
        msg = f"--profile {target}: there is no folder {target.parent}; make it, or name another"
        raise InvalidRequestError(msg)


@contextmanager
def profiled(engine: Engine, target: Path | None) -> Iterator[Profiler | None]:
    """Follow what the block does and write it, also where Ctrl-C or an error ends the block.

    Yields:
        The profiler; None where there is no ``target``.

    Raises:
        OutputError: It cannot be written.
    """
    if target is None:
        yield None
        return
    from kt_core.engine.profiler import Profiler

    profiler = Profiler(engine)
    try:
        with profiler:
            yield profiler
    finally:
        try:
            profiler.save(target)
        except OSError as error:
            msg = f"the profile was not written to {target}: {error.strerror or error}"
            raise OutputError(msg) from error
        remark(f"{target}: open it in ui.perfetto.dev or chrome://tracing")
