"""A packed model directory: its experts are mapped and used where they lie.

docs/packed-format.md draws it. Opening checks everything that can be known without reading weights:
versions, names, sizes, headers. The bytes themselves are checked by ``verify``.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kt_core.checkpoint.packed_config import (
    METHOD,
    VERSION,
    PackedConfig,
    PackedDense,
    PackedLayer,
)
from kt_core.checkpoint.safetensors_files import Checkpoint
from kt_core.checkpoint.safetensors_writer import NewTensor, tensor_bytes, write_safetensors
from kt_core.errors import CheckpointError, UnsupportedFormatError
from kt_core.interfaces import TensorInfo
from kt_core.packed.layout import ROW_BYTES

if TYPE_CHECKING:
    import torch

MANIFEST_NAME = "kt-packed.json"
"""Written last: a directory without it is not finished."""
DIGEST_BYTES = hashlib.sha256().digest_size
_AGAIN = "Copy it again, or make it again with `kt quant`."


class MappedExperts:
    """The experts of one layer in a mapped file; nothing is read until somebody looks."""

    def __init__(self, layer: PackedLayer, packed: TensorInfo, digests: TensorInfo) -> None:
        """Map the file.

        Raises:
            CheckpointError: It is not where the headers say.
        """
        self.layer = layer
        everything = _mapped(packed.file)
        self._packed = _within(everything, packed)
        self._digests = _within(everything, digests)

    def expert(self, index: int) -> torch.Tensor:
        """Return an expert's packed bytes where they lie; never to be written to."""
        return self._packed[index]

    def digest(self, index: int) -> str:
        """Return the SHA-256 that is stored for an expert."""
        return bytes(tensor_bytes(self._digests[index])).hex()

    def is_whole(self, index: int) -> bool:
        """Read an expert; say whether its bytes are those that were written."""
        return _sha256(tensor_bytes(self._packed[index])) == self.digest(index)

    def all_digests(self) -> str:
        """Return the SHA-256 of all digests, which the manifest has."""
        return _sha256(tensor_bytes(self._digests))


@dataclass(slots=True)
class PackedDirectory:
    """What a packed model directory says of itself.

    Attributes:
        directory: Where it is.
        config: Its ``quantization_config``.
        files: What the manifest says of each file: ``size_bytes``, and ``sha256`` or
            ``digests_sha256``.
    """

    directory: Path
    config: PackedConfig
    files: Mapping[str, Mapping[str, Any]]
    _mapped: dict[str, MappedExperts] = field(default_factory=dict)
    _dense_files: dict[str, torch.Tensor] = field(default_factory=dict)

    def experts(self, name: str, checkpoint: Checkpoint) -> MappedExperts:
        """Return the mapped experts of a layer.

        Raises:
            CheckpointError: The file is not what config.json says.
        """
        layer = self.config.layers[name]
        if name not in self._mapped:
            packed = _tensor(
                checkpoint, layer.file, layer.packed_name,
                (layer.num_experts, layer.bytes_per_expert),
            )  # fmt: skip
            digests = _tensor(
                checkpoint, layer.file, layer.digests_name, (layer.num_experts, DIGEST_BYTES)
            )
            _check_place(packed)
            self._mapped[name] = MappedExperts(layer, packed, digests)
        return self._mapped[name]

    def dense(self, name: str, checkpoint: Checkpoint) -> torch.Tensor:
        """Return a dense layer's packed bytes where they lie; never to be written to.

        Raises:
            CheckpointError: The file is not what config.json says.
        """
        layer = self.config.dense[name]
        packed = _tensor(checkpoint, layer.file, layer.packed_name, (layer.size_bytes,))
        _check_place(packed)
        if layer.file not in self._dense_files:
            self._dense_files[layer.file] = _mapped(packed.file)
        return _within(self._dense_files[layer.file], packed)

    def release_dense(self) -> None:
        """Let the files of dense layers go as soon as nobody has bytes of them any more."""
        self._dense_files.clear()

    def verify(
        self, checkpoint: Checkpoint, *, threads: int, progress: Callable[[float], None]
    ) -> list[str]:
        """Read everything; return what is damaged, a sentence each."""
        problems = []
        work: list[tuple[int, Callable[[], str | None]]] = []
        owners = {layer.file: layer for layer in self.config.layers.values()}
        for name, entry in self.files.items():
            size = int(entry["size_bytes"])
            if name in owners:
                layer = owners[name]
                experts = self.experts(layer.name, checkpoint)
                if experts.all_digests() != entry.get("digests_sha256"):
                    problems.append(f"the checksums in {name} are not those that were written")
                work += [
                    (layer.bytes_per_expert, _expert_check(experts, index))
                    for index in range(layer.num_experts)
                ]
            else:
                work.append((size, _file_check(self.directory / name, str(entry.get("sha256")))))
        total, done = sum(size for size, _ in work) or 1, 0
        with ThreadPoolExecutor(threads, thread_name_prefix="kt-verify") as pool:
            for (size, _), problem in zip(work, pool.map(lambda job: job[1](), work), strict=True):
                done += size
                progress(done / total)
                if problem:
                    problems.append(problem)
        return problems


def open_packed(directory: Path, config: Mapping[str, Any]) -> PackedDirectory | None:
    """Return the packed model that a config.json belongs to; None where it is not packed by kt.

    Raises:
        UnsupportedFormatError: It was written by a newer kt.
        CheckpointError: It is unfinished or damaged.
    """
    stored = config.get("quantization_config")
    if not isinstance(stored, dict) or stored.get("quant_method") != METHOD:
        return None
    parsed = PackedConfig.from_dict(stored, str(directory / "config.json"))
    files = _read_manifest(directory)
    everything: list[PackedLayer | PackedDense] = [*parsed.layers.values(), *parsed.dense.values()]
    for file in (layer.file for layer in everything):
        if file not in files:
            msg = f"{directory / MANIFEST_NAME} does not name {file}. {_AGAIN}"
            raise CheckpointError(msg)
    for name, entry in files.items():
        if name.endswith(".safetensors"):  # people edit the others
            _check_size(directory / name, int(entry["size_bytes"]))
    return PackedDirectory(directory, parsed, files)


def write_layer(
    folder: Path, layer: PackedLayer, experts: Iterable[torch.Tensor]
) -> dict[str, Any]:
    """Write the file of one layer; return its entry in the manifest.

    Args:
        folder: Where.
        layer: What.
        experts: Packed bytes of each expert, in order; asked for one after the other.
    """
    digests: list[bytes] = []

    def pieces() -> Iterator[memoryview]:
        for packed in experts:
            raw = tensor_bytes(packed)
            digests.append(hashlib.sha256(raw).digest())
            yield raw

    target = folder / layer.file
    count, size = layer.num_experts, layer.bytes_per_expert
    tensors = [
        NewTensor(
            name=layer.packed_name,
            dtype="U8",
            shape=(count, size),
            size_bytes=count * size,
            pieces=pieces(),
        ),
        NewTensor(
            name=layer.digests_name,
            dtype="U8",
            shape=(count, DIGEST_BYTES),
            size_bytes=count * DIGEST_BYTES,
            pieces=digests,  # filled by then
        ),
    ]
    write_safetensors(target, tensors)
    return {"size_bytes": target.stat().st_size, "digests_sha256": _sha256(b"".join(digests))}


def write_dense(
    folder: Path, file: str, layers: Iterable[tuple[PackedDense, Iterable[torch.Tensor]]]
) -> dict[str, Any]:
    """Write a file of packed dense layers; return its entry in the manifest.

    Args:
        folder: Where.
        file: Its name.
        layers: Each with its packed bytes, in pieces that are asked for one after the other.
    """
    tensors = [
        NewTensor(
            name=layer.packed_name,
            dtype="U8",
            shape=(layer.size_bytes,),
            size_bytes=layer.size_bytes,
            pieces=map(tensor_bytes, pieces),
        )
        for layer, pieces in layers
    ]
    write_safetensors(folder / file, tensors)
    return file_entry(folder / file)


def file_entry(file: Path) -> dict[str, Any]:
    """Return the entry of a file in the manifest: reads it."""
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"size_bytes": file.stat().st_size, "sha256": digest}


def manifest_text(files: Mapping[str, Mapping[str, Any]], version: int = VERSION) -> str:
    """Return the manifest of a directory."""
    entries = {name: dict(files[name]) for name in sorted(files)}
    return json.dumps({"version": version, "files": entries}, indent=1) + "\n"


def _read_manifest(directory: Path) -> dict[str, dict[str, Any]]:
    file = directory / MANIFEST_NAME
    if not file.is_file():
        msg = (
            f"{directory} is a packed model without {MANIFEST_NAME}: it was not finished, or not "
            f"copied whole. {_AGAIN}"
        )
        raise CheckpointError(msg)
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        version = int(manifest["version"])
        files = {
            str(name): {**entry, "size_bytes": int(entry["size_bytes"])}
            for name, entry in manifest["files"].items()
        }
        if any("/" in name or name.startswith(".") for name in files):
            msg = "it names files elsewhere"
            raise ValueError(msg)  # noqa: TRY301 - one message for whatever is wrong
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        msg = f"{file} is damaged ({type(error).__name__}: {error}). {_AGAIN}"
        raise CheckpointError(msg) from error
    if version > VERSION:
        msg = (
            f"{file} is of version {version} of kt's packed format, this kt reads up to version "
            f"{VERSION}. Update kt, or pack the original model again with this one."
        )
        raise UnsupportedFormatError(msg)
    return files


def _check_size(file: Path, size_bytes: int) -> None:
    if not file.is_file():
        msg = f"{file} is missing: {MANIFEST_NAME} names it. {_AGAIN}"
        raise CheckpointError(msg)
    if (found := file.stat().st_size) != size_bytes:
        what = "is cut off" if found < size_bytes else "is too long"
        msg = f"{file} {what}: it is {found} bytes, {size_bytes} were written. {_AGAIN}"
        raise CheckpointError(msg)


def _tensor(checkpoint: Checkpoint, file: str, name: str, shape: tuple[int, ...]) -> TensorInfo:
    info = checkpoint.tensors.get(name)
    if info is None or (info.file.name, info.dtype, info.shape) != (file, "U8", shape):
        found = None if info is None else f"{info.dtype} {list(info.shape)} in {info.file.name}"
        msg = (
            f"{name} should be U8 {list(shape)} in {file}, found {found}: the file and "
            f"config.json do not belong together. {_AGAIN}"
        )
        raise CheckpointError(msg)
    return info


def _check_place(packed: TensorInfo) -> None:
    if packed.offset % ROW_BYTES:
        msg = f"{packed.file} is damaged: packed bytes lie at no multiple of 64. {_AGAIN}"
        raise CheckpointError(msg)


def _mapped(file: Path) -> torch.Tensor:
    """``[bytes]`` uint8: a whole file, nothing of which is read until somebody looks."""
    import torch

    try:
        with file.open("rb") as stream:
            mapped = mmap.mmap(stream.fileno(), 0, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
    except (OSError, ValueError) as error:
        msg = f"{file} cannot be mapped: {error}. {_AGAIN}"
        raise CheckpointError(msg) from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that it cannot be written to
        return torch.frombuffer(mapped, dtype=torch.uint8)


def _within(everything: torch.Tensor, info: TensorInfo) -> torch.Tensor:
    return everything[info.offset : info.offset + info.size_bytes].view(info.shape)


def _expert_check(experts: MappedExperts, index: int) -> Callable[[], str | None]:
    def check() -> str | None:
        if experts.is_whole(index):
            return None
        return f"expert {index} of {experts.layer.name} in {experts.layer.file} is damaged"

    return check


def _file_check(file: Path, digest: str) -> Callable[[], str | None]:
    def check() -> str | None:
        return None if file_entry(file)["sha256"] == digest else f"{file.name} was changed"

    return check


def _sha256(data: memoryview | bytes) -> str:
    return hashlib.sha256(data).hexdigest()
