"""What experts become: the format asked for, or what they are on disk, or the best that fits."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from kt_core.checkpoint import Checkpoint
from kt_core.engine.stored_experts import layer_format, stored_formats, stored_matrices
from kt_core.engine.transformers_tensors import ExpertTensors
from kt_core.interfaces import ExpertsSite
from kt_core.plan.fitting import ExpertBytes, format_names
from kt_core.plugins import Registry
from kt_core.quant.exact import format_named
from kt_core.types import Capabilities, Format

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CandidateFormats:
    """A format for every layer.

    Attributes:
        sites: The layers.
        formats: By the prefix of a layer's parameters.
        is_stored: Whether they are what the experts are on disk.
        changes: What is not kept exactly, for the user; empty where everything is.
    """

    sites: Sequence[ExpertsSite]
    formats: dict[str, Format]
    is_stored: bool = False
    changes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """What it is called in messages."""
        return formats_name(self.formats.values())

    def is_computed_by(self, capabilities: Capabilities) -> bool:
        """Whether a device computes all of them."""
        return all(capabilities.computes(weight_format) for weight_format in self.formats.values())

    def packed_bytes(self, expert_bytes: ExpertBytes) -> int:
        """Return the bytes of all experts, packed."""
        return sum(
            site.spec.num_experts * expert_bytes(site.spec, self.formats[site.parameter_prefix])
            for site in self.sites
        )

    def explain(self, asked_for: str) -> None:
        """Tell the user what becomes of experts that are quantised, where they change."""
        for change in self.changes:
            _log.warning("%s (--format %s)", change, asked_for)


def formats_name(formats: Iterable[Format]) -> str:
    """Return the word for the formats of several layers, such as ``int4-g32+int8``."""
    return "+".join(sorted({weight_format.name for weight_format in formats}))


def site_tensors(
    site: ExpertsSite, tensors: Mapping[str, ExpertTensors]
) -> dict[str, ExpertTensors]:
    """Return the tensors of one layer, by the names that its site uses."""
    return {name: tensors[f"{site.parameter_prefix}.{name}"] for name in site.parameters}


def candidate_formats(
    asked_for: str,
    checkpoint: Checkpoint,
    sites: Sequence[ExpertsSite],
    tensors: Mapping[str, ExpertTensors],
    registry: Registry,
) -> list[CandidateFormats]:
    """Return what the experts may become, best first.

    For ``auto`` that is what they are on disk, if they are quantised, then what ``format_names``
    says. What is quantised again loses something twice, which the user is told.
    """
    stored = {
        site.parameter_prefix: stored_formats(checkpoint, site, site_tensors(site, tensors))
        for site in sites
    }
    is_quantised = any(stored.values())
    candidates = []
    if asked_for == "auto" and is_quantised:
        candidates.append(_as_stored(checkpoint, sites, tensors, stored))
    for name in format_names(asked_for):
        weight_format = registry.formats.get(name).descriptor
        others = {f.name for formats in stored.values() for f in formats or ()} - {
            weight_format.name
        }
        changes: tuple[str, ...] = ()
        if is_quantised and others:
            changes = (
                f"the checkpoint holds experts as {', '.join(sorted(others))}; they are quantised "
                f"again, as {weight_format.name}",
            )
        formats = dict.fromkeys(stored, weight_format)
        candidates.append(CandidateFormats(sites, formats, changes=changes))
    return candidates


def _as_stored(
    checkpoint: Checkpoint,
    sites: Sequence[ExpertsSite],
    tensors: Mapping[str, ExpertTensors],
    stored: Mapping[str, set[Format] | None],
) -> CandidateFormats:
    formats: dict[str, Format] = {}
    changes: dict[str, None] = {}
    for site in sites:
        found = stored[site.parameter_prefix]
        chosen = layer_format(found or {format_named("bf16")}, site)
        formats[site.parameter_prefix] = chosen
        others = {f.name for f in found or ()} - {chosen.name}
        if others:
            changes[
                f"some layers hold matrices of several formats; {', '.join(sorted(others))} is "
                f"quantised again there, as {chosen.name}"
            ] = None
        matrices = stored_matrices(checkpoint, site, site_tensors(site, tensors))
        if any(matrix is not None and matrix.weight_format is None for matrix in matrices):
            changes[
                f"no format holds exactly what the checkpoint stores; experts are quantised again, "
                f"as {chosen.name}"
            ] = None
    return CandidateFormats(sites, formats, is_stored=True, changes=tuple(changes))
