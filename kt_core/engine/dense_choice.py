"""Which dense layers are packed where ``dense_format`` names a format.

Every ``torch.nn.Linear`` in the stacks of layers that hold routed experts, and the output head:
attention, dense MLPs, shared experts. What stays as the checkpoint has it:

- subclasses of ``Linear``, which may compute something else;
- what decides instead of computing: a child of a block with experts none of whose layers gives
  hidden states, such as a router or the gate of a shared expert;
- what transformers keeps in float32 on purpose;
- layers whose weight the model's code reads itself: see ``direct_reads``;
- layers that packing would make larger, being mostly padding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from torch import nn
from transformers import PreTrainedModel

from kt_core.dense.worth import is_worth_packing
from kt_core.engine import transformers_hook as hook
from kt_core.engine.direct_reads import DirectReads
from kt_core.interfaces import ExpertsSite
from kt_core.types import Format, LinearSpec

LinearBytes: TypeAlias = Callable[[LinearSpec, Format], int]


@dataclass(frozen=True, slots=True)
class DenseSite:
    """One dense layer of the model.

    Attributes:
        names: Dotted paths of the module: several where it stands in several places.
        module: The layer; its parameters are on the meta device.
        weight: The parameter its weight is loaded from: another's, where they are tied.
        bias: The parameter its bias is loaded from; None without one.
    """

    names: tuple[str, ...]
    module: nn.Linear
    weight: str
    bias: str | None

    @property
    def spec(self) -> LinearSpec:
        """Return its shape."""
        return LinearSpec(
            in_features=self.module.in_features,
            out_features=self.module.out_features,
            has_bias=self.bias is not None,
        )

    @property
    def own_parameters(self) -> tuple[str, ...]:
        """Return the dotted names of the layer's parameters, in every place."""
        leaves = ("weight",) if self.bias is None else ("weight", "bias")
        return tuple(f"{name}.{leaf}" for name in self.names for leaf in leaves)


def choose_dense(
    model: PreTrainedModel,
    sites: Sequence[ExpertsSite],
    linear_bytes: LinearBytes,
    weight_format: Format,
) -> list[DenseSite]:
    """Return the layers to pack. The model is on the meta device, nothing in it is replaced yet.

    Args:
        model: Its parameters are of the type that they are loaded as.
        sites: Its routed experts.
        linear_bytes: What a layer takes when it is packed.
        weight_format: The format.
    """
    return [
        site
        for site in packable(model, sites)
        if is_worth_packing(
            site.spec,
            linear_bytes(replace(site.spec, has_bias=False), weight_format),
            site.module.weight.element_size(),
        )
    ]


def packable(model: PreTrainedModel, sites: Sequence[ExpertsSite]) -> list[DenseSite]:
    """Return the layers that can be packed, whether that makes them smaller or not.

    Args:
        model: As for ``choose_dense``.
        sites: Its routed experts.
    """
    deciding = {id(module) for module in _deciding(model, sites)}
    reads = DirectReads()
    found = []
    for site in _linears(model, sites):
        is_read = any(
            reads.has(model.get_submodule(parent), leaf)
            for parent, _, leaf in (name.rpartition(".") for name in site.names)
        )
        is_precise = any(hook.kept_precise(model, name) for name in site.own_parameters)
        if id(site.module) not in deciding and not is_read and not is_precise:
            found.append(site)
    return _without_owners_of_others(model, found)


def _linears(model: PreTrainedModel, sites: Sequence[ExpertsSite]) -> Iterator[DenseSite]:
    """Yield the candidates, in the order of the model."""
    stacks = tuple(f"{_stack(model, site)}." for site in sites)
    experts = tuple(f"{site.parameter_prefix}." for site in sites)
    heads = _heads(model, sites)
    places: dict[nn.Linear, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if type(module) is nn.Linear:
            places.setdefault(module, []).append(name)
    for module, names in places.items():
        is_inside = all(n.startswith(stacks) and not n.startswith(experts) for n in names)
        if is_inside or module in heads:
            parameters = [leaf for leaf, _ in module.named_parameters()]
            weight, bias = (
                hook.tied_source(model, f"{names[0]}.{leaf}") if leaf in parameters else None
                for leaf in ("weight", "bias")
            )
            assert weight is not None
            yield DenseSite(tuple(names), module, weight, bias)


def _heads(model: PreTrainedModel, sites: Sequence[ExpertsSite]) -> set[nn.Module]:
    """Return the output heads of the model, or of models in it, that have routed experts."""
    heads = set()
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        is_ours = any(site.parameter_prefix.startswith(prefix) for site in sites)
        if is_ours and isinstance(module, PreTrainedModel):
            heads.add(module.get_output_embeddings())  # type: ignore[no-untyped-call]
    return heads


def _stack(model: PreTrainedModel, site: ExpertsSite) -> str:
    """Return the path of the outermost list of modules around the experts."""
    parts = site.parameter_prefix.split(".")
    for end in range(1, len(parts)):
        path = ".".join(parts[:end])
        if isinstance(model.get_submodule(path), nn.ModuleList):
            return path
    return site.parameter_prefix.rpartition(".")[0]


def _deciding(model: PreTrainedModel, sites: Sequence[ExpertsSite]) -> Iterator[nn.Module]:
    """Yield the modules below routers and gates."""
    hidden_size = getattr(model.config.get_text_config(decoder=True), "hidden_size", None)
    for site in sites:
        block = model.get_submodule(site.parameter_prefix.rpartition(".")[0])
        for child in block.children():
            outputs = {m.out_features for m in child.modules() if isinstance(m, nn.Linear)}
            if not outputs & {hidden_size, site.spec.hidden_size}:
                yield from child.modules()


def _without_owners_of_others(model: PreTrainedModel, chosen: list[DenseSite]) -> list[DenseSite]:
    """Leave out layers whose weight another parameter shares that transformers still loads.

    Layers that share a weight have one shape, and are worth packing together or not at all.
    """
    tied: dict[str, str] = dict(model.all_tied_weights_keys or {})
    while True:
        packed = {name for site in chosen for name in site.own_parameters}
        needed = {source for target, source in tied.items() if target not in packed}
        kept = [site for site in chosen if not needed.intersection(site.own_parameters)]
        if len(kept) == len(chosen):
            return kept
        chosen = kept
