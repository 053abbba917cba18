"""How much memory a model takes on a machine, and how fast it will be: before it is loaded."""

from __future__ import annotations

from kt_core.plan.advice import advise
from kt_core.plan.machine import Card, ExpertRates, HostRates, Machine
from kt_core.plan.outline import CacheLayer, DenseWork, ExpertLayer, LinearLayers, ModelOutline
from kt_core.plan.planner import Formats, Plan, Planner, Wish
from kt_core.plan.roofline import CardEfficiency, Speed, Times
from kt_core.plan.training import TrainingMemory, training_memory

__all__ = [
    "CacheLayer",
    "Card",
    "CardEfficiency",
    "DenseWork",
    "ExpertLayer",
    "ExpertRates",
    "Formats",
    "HostRates",
    "LinearLayers",
    "Machine",
    "ModelOutline",
    "Plan",
    "Planner",
    "Speed",
    "Times",
    "TrainingMemory",
    "Wish",
    "advise",
    "training_memory",
]
