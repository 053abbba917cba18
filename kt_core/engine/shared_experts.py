"""Lets the shared experts of a loaded model run while its routed ones are computed."""

from __future__ import annotations

import logging

import torch
from transformers import PreTrainedModel

from kt_core.moe.beside import BesideStream, run_beside_experts

_log = logging.getLogger(__name__)


def run_shared_beside(model: PreTrainedModel, device: torch.device) -> BesideStream | None:
    """Try the model on two tokens, and move what its blocks call beside their experts.

    A model that cannot be tried stays as it is, with a warning.

    Returns:
        The stream they run in; None where there is nothing to move.
    """

    def try_out() -> None:
        model(input_ids=torch.zeros(1, 2, dtype=torch.int64, device=device), use_cache=False)

    try:
        return run_beside_experts(model, device, try_out)
    except Exception as error:  # noqa: BLE001 - whatever the model's code makes of it
        reason = f"{type(error).__name__}: {error}"
        _log.warning("shared experts run in the model's own order, it was not tried: %s", reason)
        return None
