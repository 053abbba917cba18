"""Where the routed experts of a model are, as its adapters say."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from transformers import PreTrainedModel

from kt_core.engine import transformers_hook as hook
from kt_core.errors import UnsupportedModelError
from kt_core.interfaces import ExpertsSite, ModelAdapter


def find_sites(model: PreTrainedModel, adapters: Sequence[ModelAdapter]) -> list[ExpertsSite]:
    """Return what the first adapter sees that sees any. The model is on the meta device.

    Raises:
        UnsupportedModelError: None sees any.
    """
    for adapter in adapters:
        if sites := list(adapter.sites(model)):
            return sites
    msg = (
        f"{type(model).__name__} has no routed experts that kt can see: it is a dense "
        "model, or an adapter is missing (docs/add-a-model.md). Dense models run in plain "
        "transformers, vLLM or llama.cpp."
    )
    raise UnsupportedModelError(msg)


def split_tied(
    model: PreTrainedModel, sites: Iterable[ExpertsSite]
) -> tuple[list[ExpertsSite], list[tuple[str, ExpertsSite]]]:
    """Sites with weights of their own, and those that share another's, with its prefix."""
    own: list[ExpertsSite] = []
    tied: list[tuple[str, ExpertsSite]] = []
    for site in sites:
        first = site.parameters[0]
        source = hook.tied_source(model, f"{site.parameter_prefix}.{first}")
        owner = source.removesuffix(f".{first}")
        if owner == site.parameter_prefix:
            own.append(site)
        else:
            tied.append((owner, site))
    return own, tied
