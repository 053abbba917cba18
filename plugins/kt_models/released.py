"""Configs of released models, for ``kt plan``: sizes, and what decides them.

Each file in ``configs/`` holds what sizes and speed depend on, under the keys of the model's own
config.json; ``released.json`` says where the numbers were read and how many parameters the model's
authors count, which a test compares with what the config comes to.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from kt_core.interfaces import NamedConfig

_FOLDER = Path(__file__).parent


def released_configs() -> Iterator[NamedConfig]:
    """Yield them all, in the order of the table."""
    table = json.loads((_FOLDER / "released.json").read_text(encoding="utf-8"))
    for name, facts in table.items():
        yield NamedConfig(
            name=name,
            description=facts["description"],
            file=_FOLDER / "configs" / f"{name}.json",
        )
