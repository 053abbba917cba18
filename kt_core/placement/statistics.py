"""Routing statistics on disk: learned in one run, used at the start of the next.

JSON: ``format`` (``kt-routing-statistics``), ``version`` (1), ``tokens``, and ``counts``, a list of
lists with the pairs routed to each expert of each layer.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from kt_core.errors import TraceError
from kt_core.interfaces import RoutingStatistics
from kt_core.paths import cache_dir, replacing

FORMAT, VERSION = "kt-routing-statistics", 1


def statistics_file(model_directory: Path) -> Path:
    """Return where the statistics of a model are kept: ``$XDG_CACHE_HOME/kt/statistics``.

    Models are told apart by the name of the folder, config.json, and names and sizes of the weight
    files. Two fine-tunes in folders of one name share a file: that costs speed, not correctness.
    """
    digest = hashlib.sha256()
    config = model_directory / "config.json"
    digest.update(config.read_bytes() if config.is_file() else b"")
    for file in sorted(model_directory.glob("*.safetensors")):
        digest.update(f"{file.name} {file.stat().st_size}\n".encode())
    name = f"{model_directory.resolve().name}-{digest.hexdigest()[:12]}.json"
    return cache_dir() / "statistics" / name


def merge(first: RoutingStatistics, second: RoutingStatistics) -> RoutingStatistics:
    """Add up two statistics of one model.

    Raises:
        ValueError: They are of different models.
    """
    if [*map(len, first.counts)] != [*map(len, second.counts)]:
        msg = "statistics of models with other layers or numbers of experts cannot be added up"
        raise ValueError(msg)
    layers = zip(first.counts, second.counts, strict=True)
    return RoutingStatistics(
        counts=tuple(tuple(a + b for a, b in zip(x, y, strict=True)) for x, y in layers),
        tokens=first.tokens + second.tokens,
    )


def save_statistics(statistics: RoutingStatistics, file: Path) -> None:
    """Write statistics, whole or not at all; the folder is made where it is absent.

    Raises:
        TraceError: They cannot be written.
    """
    content = {"format": FORMAT, "version": VERSION, "tokens": statistics.tokens}
    text = json.dumps({**content, "counts": statistics.counts})
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        msg = (
            f"cannot write the routing statistics {str(file)!r}: {error}. "
            "Make room, or choose another file (XDG_CACHE_HOME moves kt's own)."
        )
        raise TraceError(msg) from error


def load_statistics(file: Path) -> RoutingStatistics | None:
    """Read statistics; None where there is no such file.

    Raises:
        TraceError: The file holds no statistics that this version reads.
    """
    try:
        return _from_json(json.loads(file.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, KeyError, TypeError, ValueError) as error:
        msg = (
            f"{str(file)!r} holds no routing statistics ({type(error).__name__}: {error}); "
            "delete it, `kt trace` writes it anew"
        )
        raise TraceError(msg) from error


def _from_json(found: Any) -> RoutingStatistics:
    if (found["format"], found["version"]) != (FORMAT, VERSION):
        msg = f"it is {found['format']} version {found['version']}, not {FORMAT} {VERSION}"
        raise ValueError(msg)
    counts = tuple(tuple(map(float, layer)) for layer in found["counts"])
    return RoutingStatistics(counts=counts, tokens=float(found["tokens"]))
