"""The command line ``kt``: one file per command."""

from __future__ import annotations

from kt_core.cli.main import main

__all__ = ["main"]
