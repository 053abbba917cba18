"""Is it worth loading experts before their router has spoken?

The prediction is recorded with the trace: see ``kt_core.engine.routing``.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kt_core.placement.machine import Machine
from kt_core.placement.trace import NO_EXPERT, RoutingTrace


def prediction_recall(trace: RoutingTrace) -> npt.NDArray[np.float64]:
    """Return, for each layer, the part of the chosen experts that were foretold; NaN for the first.

    As many are foretold as are chosen, so this is also the part of the foretold that were right.

    Raises:
        ValueError: The trace holds no predictions.
    """
    if trace.predicted_ids is None:
        msg = "the trace holds no predictions: record it with `kt trace --predict`"
        raise ValueError(msg)
    chosen, foretold = trace.expert_ids, trace.predicted_ids
    is_pair = chosen != NO_EXPERT
    is_found = (chosen[..., :, None] == foretold[..., None, :]).any(axis=-1) & is_pair
    recall: npt.NDArray[np.float64] = is_found.sum(axis=(0, 2)) / is_pair.sum(axis=(0, 2))
    recall[(foretold == NO_EXPERT).all(axis=(0, 2))] = np.nan
    return recall


def chance_recall(trace: RoutingTrace) -> npt.NDArray[np.float64]:
    """Return the recall of always foretelling the most used experts of a layer: what to beat."""
    counts = np.sort(trace.counts(), axis=1)[:, ::-1]
    most_used: npt.NDArray[np.float64] = counts[:, : trace.top_k].sum(axis=1) / counts.sum(axis=1)
    return most_used


def prefetch_pays(*, recall: float, saved_s: float, cost_s: float) -> bool:
    """Return whether loading a foretold expert early saves time on average.

    Args:
        recall: How often it is then asked for, 0 to 1.
        saved_s: Seconds that the layer is shorter by if it is.
        cost_s: Seconds lost whether it is or not.
    """
    return recall * saved_s > cost_s


def prefetch_terms(machine: Machine, expert_bytes: int, *, window_s: float) -> tuple[float, float]:
    """Return ``saved_s`` and ``cost_s`` of loading one expert for one decode step of one token.

    Saved is the time the CPU, as the slower side, would read it; lost is what the copy takes
    beyond the window between prediction and use, in which the link would have been idle.
    """
    saved_s = expert_bytes / machine.cpu_bytes_per_s
    copy_s = expert_bytes / (machine.link_bytes_per_s * machine.link_share)
    return saved_s, max(0.0, copy_s - window_s)
