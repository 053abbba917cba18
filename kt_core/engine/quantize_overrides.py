"""Formats of single layers, by patterns of their paths."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence

from kt_core.errors import InvalidRequestError
from kt_core.interfaces import ExpertsSite, WeightFormat

NO_FORMAT = "none"
"""Leaves a dense layer as it is."""


def format_for(
    names: Sequence[str], otherwise: WeightFormat, overrides: Mapping[str, WeightFormat | None]
) -> WeightFormat | None:
    """Return the format of the first pattern that matches one of a module's paths.

    None where that is ``none``; ``otherwise`` where no pattern matches.
    """
    for pattern, found in overrides.items():
        if any(fnmatch.fnmatch(name, pattern) for name in names):
            return found
    return otherwise


def check_overrides(
    overrides: Mapping[str, WeightFormat | None],
    sites: Sequence[ExpertsSite],
    dense_names: Sequence[str],
) -> None:
    """Refuse patterns that match nothing.

    Args:
        overrides: By pattern.
        sites: Routed experts.
        dense_names: Paths of dense layers that are packed, or would be without an override.

    Raises:
        InvalidRequestError: One matches nothing, or single experts.
    """
    experts = [site.module_name for site in sites]
    for pattern in overrides:
        if fnmatch.filter([*experts, *dense_names], pattern):
            continue
        if layer := _layer_within(pattern, sites):
            msg = (
                f"the override {pattern!r} is for single experts, which cannot have formats of "
                "their own: one kernel computes all experts of a layer, and reads them in one "
                f"format. Name the whole layer: {layer!r}"
            )
            raise InvalidRequestError(msg)
        msg = (
            f"the override {pattern!r} matches no experts; there are {experts[0]} ... {experts[-1]}"
        )
        if dense_names:
            msg += f", nor dense layers; there are {dense_names[0]} ... {dense_names[-1]}"
        else:
            msg += ". Dense layers are packed with --dense-format only"
        raise InvalidRequestError(msg)


def _layer_within(pattern: str, sites: Sequence[ExpertsSite]) -> str | None:
    """Return the layer of an expert that a pattern, or its beginning, names by its number."""
    experts = {
        f"{site.module_name}.{expert}": site.module_name
        for site in sites
        for expert in range(site.spec.num_experts)
    }
    while pattern:
        if any(map(str.isdigit, pattern.rpartition(".")[2])):
            for name in fnmatch.filter(experts, pattern):
                return experts[name]
        pattern = pattern.rpartition(".")[0]
    return None
