"""Models that were packed on the way: kept under ``$XDG_CACHE_HOME/kt/packed``.

A folder is named after the model, the format, and a digest of the source's content and of what was
made of it: another source, or another version of the packed format, is another folder.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kt_core.checkpoint.packed_directory import MANIFEST_NAME
from kt_core.engine.quantize import quantize
from kt_core.engine.quantize_expert import Method
from kt_core.engine.quantize_plan import plan_quantization
from kt_core.errors import InvalidRequestError, UnknownNameError
from kt_core.interfaces import Progress
from kt_core.paths import cache_dir
from kt_core.plugins import Registry

_DIGEST_LETTERS = 16


@dataclass(frozen=True, slots=True)
class CachedModel:
    """One folder of the cache.

    Attributes:
        name: Of the folder.
        path: The folder.
        size_bytes: What it takes.
        is_finished: False for what a run that was killed left.
        last_used_s: When it was last loaded, in seconds since 1970.
    """

    name: str
    path: Path
    size_bytes: int
    is_finished: bool
    last_used_s: float

    def to_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
        return asdict(self) | {"path": str(self.path)}


def cache_root() -> Path:
    """Return where the folders are."""
    return cache_dir() / "packed"


def cached(
    source: Path,
    registry: Registry,
    weight_format: str,
    threads: int | None,
    progress: Progress,
) -> Path:
    """Return the packed model of a source, making it where it is absent.

    To the nearest, as loading does: the answers are those of a run without the cache.

    Raises:
        InvalidRequestError: ``weight_format`` is ``auto``.
        KtError: As ``quantize``.
    """
    if weight_format == "auto":
        msg = "a cache needs to know what the experts become: give a format, such as --format int4"
        raise InvalidRequestError(msg)
    plan = plan_quantization(source, registry, weight_format=weight_format, method=Method.RTN)
    digest = plan.fingerprint()[:_DIGEST_LETTERS]
    target = cache_root() / f"{source.resolve().name}-{weight_format}-{digest}"
    if not (target / MANIFEST_NAME).is_file():
        quantize(plan, target, method=Method.RTN, threads=threads, progress=progress)
    os.utime(target / MANIFEST_NAME)
    return target


def cached_models() -> Iterator[CachedModel]:
    """Yield what is in the cache, the last used first."""
    root = cache_root()
    folders = [folder for folder in root.iterdir() if folder.is_dir()] if root.is_dir() else []
    found = [_describe(folder) for folder in folders]
    yield from sorted(found, key=lambda model: -model.last_used_s)


def remove_cached(names: list[str]) -> list[CachedModel]:
    """Remove folders of the cache, all of them without names; return what was removed.

    Raises:
        UnknownNameError: There is none of that name; nothing is removed then.
    """
    models = {model.name: model for model in cached_models()}
    for name in names:
        if name not in models:
            known = ", ".join(models) or "nothing"
            msg = f"{name!r} is not in the cache; there is: {known}"
            raise UnknownNameError(msg)
    removed = [models[name] for name in names or models]
    for model in removed:
        # First the mark that it is finished: one that is half removed is never loaded.
        (model.path / MANIFEST_NAME).unlink(missing_ok=True)
        shutil.rmtree(model.path)
    return removed


def _describe(folder: Path) -> CachedModel:
    files = [file.stat() for file in folder.iterdir() if file.is_file()]
    manifest = folder / MANIFEST_NAME
    is_finished = manifest.is_file() and not folder.name.startswith(".")
    return CachedModel(
        name=folder.name,
        path=folder,
        size_bytes=sum(stat.st_size for stat in files),
        is_finished=is_finished,
        last_used_s=(manifest if is_finished else folder).stat().st_mtime,
    )
