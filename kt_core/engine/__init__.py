"""The embedded engine: load a model, generate text."""

from __future__ import annotations

from kt_core.engine.engine import Engine, load
from kt_core.engine.generation import Completion, GenerationOptions, Timing, TokenEvent
from kt_core.engine.stats import EngineStats

__all__ = [
    "Completion",
    "Engine",
    "EngineStats",
    "GenerationOptions",
    "Timing",
    "TokenEvent",
    "load",
]
