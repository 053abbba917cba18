"""The model called ``demo``: made once, then found in the cache."""

from __future__ import annotations

import os
import shutil
from importlib.resources import files
from typing import TYPE_CHECKING

from kt_core.errors import ModelSourceError
from kt_core.interfaces import ModelSource, no_progress
from kt_demo.fetch import fetch
from kt_demo.lock import exclusive
from kt_demo.recipe import DEMO

if TYPE_CHECKING:
    from pathlib import Path

    from kt_core.interfaces import Progress
    from kt_demo.recipe import Recipe

_NOTES = ("LICENSE", "PROVENANCE.md")
_EXPECTED = ("config.json", "model.safetensors", "tokenizer.json", *_NOTES)


class DemoSource(ModelSource):
    """SmolLM2-135M-Instruct as a Mixture of Experts."""

    name = "demo"
    description = "SmolLM2-135M-Instruct cut into 16 experts per layer (0.3 GB, Apache-2.0)"

    def resolve(self, cache_dir: Path, progress: Progress = no_progress) -> Path:
        """Return the demo model's directory, making it where it is absent."""
        return ensure(cache_dir, progress=progress)


def ensure(cache_root: Path, *, recipe: Recipe = DEMO, progress: Progress = no_progress) -> Path:
    """Return ``cache_root/models/<recipe.directory>``, making it where it is absent.

    Safe against a second process, Ctrl-C and power loss: the folder appears under its name in one
    rename, when everything in it is on disk.
    """
    target = cache_root / "models" / recipe.directory
    if _is_finished(target):
        return target

    def on_wait() -> None:
        progress("waiting for another kt that makes the demo model", None)

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with exclusive(target.with_name(f".{target.name}.lock"), on_wait=on_wait):
            if not _is_finished(target):
                _make(cache_root, target, recipe, progress)
    except OSError as err:
        msg = (
            f"cannot make the demo model in {str(target)!r}: {err}.\n"
            "It needs about 0.5 GB in a folder that you may write to: make room, or set "
            "XDG_CACHE_HOME to another folder."
        )
        raise ModelSourceError(msg) from err
    return target


def _make(cache_root: Path, target: Path, recipe: Recipe, progress: Progress) -> None:
    from kt_demo.convert import convert  # torch and transformers: seconds

    building = target.with_name(f".{target.name}.building")
    _remove(building)  # of a run that was killed
    try:
        gguf = fetch(recipe.file, cache_root / "downloads", progress=progress)
        convert(gguf, building, shape=recipe.shape, seed=recipe.seed, progress=progress)
        for note in _NOTES:
            (building / note).write_bytes((files("kt_demo") / "data" / note).read_bytes())
        _sync(building)
        _remove(target)  # something incomplete that a hand left there
        building.rename(target)
    finally:
        _remove(building)


def _is_finished(target: Path) -> bool:
    return all((target / name).is_file() for name in _EXPECTED)


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


def _sync(folder: Path) -> None:
    """Wait until every file of ``folder``, and their names, are on disk."""
    for path in (*folder.iterdir(), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
