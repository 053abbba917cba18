"""Quantise a model once: read its checkpoint layer by layer, write a packed model directory.

Everything is made in a folder beside the target, named ``.TARGET.unfinished``, each file whole or
not at all; when all is there and was read back, the folder gets the target's name. A run that was
killed is taken up where it was: files that are there stay.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from kt_core import hardware
from kt_core.checkpoint import Checkpoint, open_checkpoint, open_packed
from kt_core.checkpoint.packed_directory import (
    MANIFEST_NAME,
    PackedDirectory,
    file_entry,
    manifest_text,
    write_dense,
    write_layer,
)
from kt_core.checkpoint.safetensors_files import INDEX_NAME
from kt_core.checkpoint.safetensors_writer import NewTensor, tensor_bytes, write_safetensors
from kt_core.engine.model_files import read_config
from kt_core.engine.one_torch_thread import one_torch_thread
from kt_core.engine.quantize_dense import DenseWorker
from kt_core.engine.quantize_expert import Method
from kt_core.engine.quantize_layer import Inputs, LayerWorker
from kt_core.engine.quantize_plan import LayerPlan, QuantPlan, check_room, new_config
from kt_core.engine.quantize_report import LayerReport, QuantReport
from kt_core.errors import CheckpointError, InvalidRequestError, NotEnoughDiskError
from kt_core.interfaces import Progress, no_progress
from kt_core.paths import replacing

if TYPE_CHECKING:
    from kt_core.engine.calibration import Calibration

_STATE_NAME = "kt-quant-state.json"
_INTERNAL = (_STATE_NAME, "lock")
_CALIBRATION = "kt-calibration"

Calibrator: TypeAlias = "Callable[[Path], Calibration]"
"""Makes a calibration in a folder, or finds what an earlier run made there."""


@dataclass(slots=True)
class _State:
    """What an unfinished folder knows of itself."""

    fingerprint: str
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    layers: dict[str, dict[str, Any]] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        with replacing(folder / _STATE_NAME) as temporary:
            temporary.write_text(json.dumps(asdict(self)), encoding="utf-8")

    def has(self, folder: Path, name: str) -> bool:
        """Whether a file was written, and is there as it was."""
        file = folder / name
        return (
            name in self.files
            and file.is_file()
            and file.stat().st_size == self.files[name]["size_bytes"]
        )


def quantize(
    plan: QuantPlan,
    target: Path,
    *,
    method: Method,
    calibrator: Calibrator | None = None,
    threads: int | None = None,
    progress: Progress = no_progress,
) -> QuantReport:
    """Write the packed model directory ``target``, which must not exist.

    Args:
        plan: What is to be done.
        target: The directory.
        method: How weights become codes.
        calibrator: Says which weights matter: see ``kt_core.engine.calibration``.
        threads: How many work; None for one per physical core.
        progress: Told how far it has come.

    Raises:
        InvalidRequestError: ``target`` exists, an unfinished one is another job's, or another kt
            works on it.
        NotEnoughDiskError: There is not enough room on the disk, or no longer.
        CheckpointError: A weight is NaN or infinite, or what was written reads back otherwise.
        OSError: The folder may not be written to.
    """
    start = time.perf_counter()
    check_target(target)
    folder = unfinished(target)
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        state = _resume(folder, plan.fingerprint())
        report = QuantReport(str(target), plan.config.method, resumed_files=len(state.files))
        written = sum(int(entry["size_bytes"]) for entry in state.files.values())
        check_room(folder, plan.size_bytes, written)
        count = threads or hardware.detect(with_accelerators=False).cpu.usable_threads
        try:
            calibration = calibrator(folder / _CALIBRATION) if calibrator else None
            job = _Job(plan, folder, state, method, calibration, count, progress)
            with one_torch_thread():
                job.copy_dense()
                job.write_dense()
                job.write_layers()
                job.write_others()
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            msg = (
                f"the disk of {folder} is full. Make room and run the same command again: it goes "
                "on where it was."
            )
            raise NotEnoughDiskError(msg) from error
        _verify(folder, count, progress)
        report.layers = [LayerReport(**state.layers[p.layer.name]) for p in plan.layers]
        report.dense_layers = [LayerReport(**state.layers[name]) for name in plan.config.dense]
        report.expert_bytes = sum(p.layer.size_bytes for p in plan.layers)
        report.dense_bytes = plan.dense_bytes
        shutil.rmtree(folder / _CALIBRATION, ignore_errors=True)
        for name in _INTERNAL:
            (folder / name).unlink(missing_ok=True)
        folder.rename(target)
        _sync_folder(target.parent)
    report.seconds = time.perf_counter() - start
    return report


def check_target(target: Path) -> None:
    """Refuse to write over anything.

    Raises:
        InvalidRequestError: There is something.
    """
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        msg = f"{target} exists already: remove it, or give another name"
        raise InvalidRequestError(msg)


def unfinished(target: Path) -> Path:
    """Return the folder that becomes ``target``."""
    return target.with_name(f".{target.name}.unfinished")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other processes out; the kernel lets go when this one ends, however it does."""
    with (folder / "lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            msg = f"another kt quant works on {folder}: wait for it, or end it"
            raise InvalidRequestError(msg) from error
        yield


def _resume(folder: Path, fingerprint: str) -> _State:
    """Return what was done before; remove what was not finished."""
    for leftover in folder.rglob(".*"):
        leftover.unlink()  # of a run that was killed while it wrote
    file = folder / _STATE_NAME
    if not file.is_file():
        state = _State(fingerprint)
        state.save(folder)
        return state
    try:
        state = _State(**json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        msg = f"{file} is damaged ({error}): remove {folder} and start again"
        raise CheckpointError(msg) from error
    if state.fingerprint != fingerprint:
        msg = (
            f"{folder} is what another run left, from another source or with other options: run "
            "that one again to finish it, or remove the folder"
        )
        raise InvalidRequestError(msg)
    state.files = {n: e for n, e in state.files.items() if state.has(folder, n)}
    return state


@dataclass(slots=True)
class _Job:
    """What writes the files."""

    plan: QuantPlan
    folder: Path
    state: _State
    method: Method
    calibration: Calibration | None
    threads: int
    progress: Progress

    def write_layers(self) -> None:
        """Write a file for each layer that has none."""
        layers = self.plan.layers
        total = sum(p.num_weights for p in layers)
        done = sum(p.num_weights for p in layers if p.layer.file in self.state.files)
        self.progress("quantising experts", done / total)
        for number, plan in enumerate(layers):
            if plan.layer.file in self.state.files:
                continue

            def report(experts: int, before: int = done, each: LayerPlan = plan) -> None:
                now = before + experts * each.site.spec.weights_per_expert
                self.progress("quantising experts", now / total)

            worker = LayerWorker(plan, self.method, self.threads, self._inputs(number), report)
            self.state.files[plan.layer.file] = write_layer(
                self.folder, plan.layer, worker.packed_experts()
            )
            self.state.layers[plan.layer.name] = asdict(worker.report())
            self.state.save(self.folder)
            done += plan.num_weights

    def _inputs(self, layer: int) -> Inputs | None:
        return None if self.calibration is None else partial(self.calibration.inputs, layer)

    def write_dense(self) -> None:
        """Write the dense layers that are packed, a file after the other."""
        shards, done = self.plan.dense_files, 0
        total = sum(len(plans) for plans in shards.values())

        def on_done() -> None:
            nonlocal done
            done += 1
            self.progress("quantising dense layers", done / total)

        for file, plans in shards.items():
            if file in self.state.files:
                done += len(plans)
                continue
            workers = [DenseWorker(plan, self.method, self.threads, on_done) for plan in plans]
            self.state.files[file] = write_dense(
                self.folder, file, [(w.plan.layer, w.pieces()) for w in workers]
            )
            for worker in workers:
                self.state.layers[worker.plan.layer.name] = asdict(worker.report())
            self.state.save(self.folder)

    def copy_dense(self) -> None:
        """Copy dense tensors, bytes as they are."""
        self.progress("copying dense weights", None)
        for file, names in self.plan.shards.items():
            if file in self.state.files:
                continue
            write_safetensors(self.folder / file, [self._copied(name) for name in names])
            self.state.files[file] = file_entry(self.folder / file)
            self.state.save(self.folder)

    def _copied(self, name: str) -> NewTensor:
        info = self.plan.checkpoint.tensors[name]
        decoded = self.plan.decoded_type(name)

        def pieces() -> Iterator[memoryview]:
            value = self.plan.checkpoint.read(name)
            yield tensor_bytes(value if decoded is None else value.to(decoded))

        return NewTensor(
            name=name,
            dtype=self.plan.dense_word(name),
            shape=info.shape,
            size_bytes=self.plan.dense_size(name),
            pieces=pieces(),
        )

    def write_others(self) -> None:
        """Copy tokenizer and the like; write index, config and, last, the manifest."""
        plan, folder = self.plan, self.folder
        for source in plan.copied:
            with replacing(folder / source.name) as temporary:
                shutil.copyfile(source, temporary)
        saved = []
        if plan.tokenizer is not None:
            saved = [Path(file).name for file in plan.tokenizer.save_pretrained(folder)]
            saved = [name for name in dict.fromkeys(saved) if (folder / name).is_file()]
        weight_map = {name: file for file, names in plan.shards.items() for name in names}
        for dense in plan.config.dense.values():
            weight_map[dense.packed_name] = dense.file
        for layer_plan in plan.layers:
            layer = layer_plan.layer
            weight_map |= dict.fromkeys((layer.packed_name, layer.digests_name), layer.file)
        total = plan.dense_bytes + sum(p.layer.size_bytes for p in plan.layers)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        texts = {INDEX_NAME: index, "config.json": new_config(plan)}
        for name, content in texts.items():
            with replacing(folder / name) as temporary:
                temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        small = [*(source.name for source in plan.copied), *saved, *texts]
        files = self.state.files | {name: file_entry(folder / name) for name in small}
        with replacing(folder / MANIFEST_NAME) as temporary:
            temporary.write_text(manifest_text(files, plan.config.version), encoding="utf-8")
        _sync_folder(folder)


def _verify(folder: Path, threads: int, progress: Progress) -> None:
    directory, checkpoint = open_finished(folder)
    problems = directory.verify(
        checkpoint, threads=threads, progress=lambda part: progress("reading it back", part)
    )
    if problems:
        msg = (
            f"what was written to {folder} reads back otherwise: {'; '.join(problems[:3])}. The "
            "disk or the memory may be faulty; remove the folder and start again."
        )
        raise CheckpointError(msg)


def open_finished(folder: Path) -> tuple[PackedDirectory, Checkpoint]:
    """Open a packed model directory.

    Raises:
        CheckpointError: It is damaged, or not packed by kt.
        UnsupportedFormatError: It was written by a newer kt.
    """
    directory = open_packed(folder, read_config(folder))
    if directory is None:
        msg = f"{folder} is not packed by kt: make a packed model with `kt quant`"
        raise CheckpointError(msg)
    return directory, open_checkpoint(folder)


def _sync_folder(folder: Path) -> None:
    """Wait until the names in it are on disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
