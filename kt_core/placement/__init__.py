"""Placement of experts. The built-in policies are registered as a plug-in like any other.

Nothing here imports numpy until it runs: the command line imports this package at every start.
"""

from __future__ import annotations

from kt_core.hookspecs import Register, hookimpl
from kt_core.interfaces import PlacementPolicy
from kt_core.placement.adaptive import Adaptive
from kt_core.placement.frequency import Frequency
from kt_core.placement.front_loading import FrontLoading
from kt_core.placement.random import Random
from kt_core.placement.uniform import Uniform

__all__ = [
    "Adaptive",
    "Frequency",
    "FrontLoading",
    "Random",
    "Uniform",
    "kt_register_placement_policies",
]


@hookimpl
def kt_register_placement_policies(register: Register[PlacementPolicy]) -> None:
    """Register the built-in policies."""
    for policy in (Adaptive(), Frequency(), Uniform(), FrontLoading(), Random()):
        register(policy)
