"""What `mkdocs build --strict` lets pass although it is broken."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
INCLUDE = re.compile(r' *--8<-- "[^"]+"')


@pytest.mark.parametrize("page", sorted(DOCS.rglob("*.md")), ids=lambda page: page.name)
def test_includes_are_includes(page: Path) -> None:
    """A formatter that takes ``--8<--`` for code leaves a line that includes nothing."""
    lines = page.read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if "--8" in line and not INCLUDE.fullmatch(line)] == []
