"""``kt plan``: what a model takes and how fast it will be, before anything is downloaded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from kt_core.cli import plan_options as option
from kt_core.cli.output import complain, print_json, progress_bar, registry_of, remark
from kt_core.cli.run import silence_transformers
from kt_core.errors import InvalidRequestError, UnsupportedDenseError, UnsupportedFormatError
from kt_core.paths import cache_dir
from kt_core.plugins import Registry

if TYPE_CHECKING:
    from kt_core.engine.stored_format import StoredFormats
    from kt_core.interfaces import ExpertDevice, Progress
    from kt_core.plan import Formats, ModelOutline, Plan, Planner, Wish
    from kt_core.plan.description import Description
    from kt_core.types import Format

EPILOG = """
Examples:

* `kt plan demo` plans for this machine
* `kt plan deepseek-v3 --vram 24GiB --ram 512GiB --cores 32 --bandwidth 200GB/s`
* `kt plan kimi-k2 --machine server.yaml --context 65536 --plot kimi.svg`
* `kt plan qwen3-30b-a3b --json | jq .decode_tokens_per_s`
"""
_DEFAULT_CONTEXT, _DEFAULT_PROMPT = 8192, 512
# Of a matrix on which formats are compared by their bits.
_MANY_INPUTS = 4096


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(epilog=EPILOG)(plan)


def plan(
    context: typer.Context,
    model: option.Model,
    *,
    machine: option.MachineFile = None,
    ram: option.Ram = None,
    vram: option.Vram = None,
    bandwidth: option.Bandwidth = None,
    pcie: option.Pcie = None,
    cores: option.Cores = None,
    remeasure: option.Remeasure = False,
    weight_format: option.Format = "auto",
    dense_format: option.DenseFormat = "auto",
    context_tokens: option.Context = None,
    prompt_tokens: option.PromptTokens = None,
    hot_experts: option.HotExperts = None,
    lora_rank: option.LoraRank = 16,
    sequence_length: option.SequenceLength = 2048,
    plot: option.Plot = None,
    as_json: option.AsJson = False,
) -> None:
    """Say what a model takes on a machine, and how fast it will be, without its weights.

    Exits with 1 if it does not fit, and says what would.
    """
    from kt_core.plan.description import Description, read_description

    described = read_description(machine) if machine else Description()
    described = described.overridden_by(_description(ram, vram, bandwidth, pcie, cores))
    if plot:
        from kt_core.plan.plot import check_plot

        check_plot(plot)
    registry = registry_of(context)
    if weight_format != "auto":
        registry.formats.get(weight_format)  # an unknown name fails before the work
    if dense_format not in ("auto", "none"):
        registry.formats.get(dense_format)
    silence_transformers()
    with progress_bar("starting") as progress:
        from kt_core.engine.outline import outline_model
        from kt_core.engine.stored_format import formats_on_disk, weights_of
        from kt_core.plan import advise
        from kt_core.plan.report import report_of

        outline = outline_model(model, registry, progress)
        stored = formats_on_disk(weights_of(model, registry), registry)
        wish = replace(
            _wish(outline, context_tokens, prompt_tokens),
            hot_experts=hot_experts,
            lora_rank=lora_rank,
            sequence_length=sequence_length,
        )
        with _planner(outline, described, registry, remeasure, progress) as (planner, device):
            is_left = planner.machine.card is not None and _leaves_dense(described, registry)
            dense = _dense_choices(dense_format, registry, stored, leaves_dense=is_left)
            choices = _choices(weight_format, dense, registry, device, stored)
            chosen = planner.best_plan(choices, wish)
            others = _choices("auto", dense, registry, device, stored)
            report = report_of(model, planner, chosen, wish, advise(planner, chosen, others, wish))
            if plot:
                _draw(plot, model, planner, chosen, choices)
    _show(report, as_json=as_json)
    if plot:
        remark(f"wrote {plot}")
    if not chosen.fits:
        complain("error", f"{model} does not fit: {'; '.join(report['advice'])}")
        raise typer.Exit(1)


def _description(
    ram: str | None, vram: str | None, bandwidth: str | None, pcie: str | None, cores: int | None
) -> Description:
    from kt_core.plan.description import Description
    from kt_core.plan.units import parse_bytes, parse_bytes_per_s

    no_card = vram is not None and vram.strip() == "0"
    if pcie and no_card:
        msg = "--pcie is the link to an accelerator, and --vram 0 is a machine without one"
        raise InvalidRequestError(msg)
    return Description(
        memory_bytes=parse_bytes(ram, "--ram") if ram else None,
        cores=cores,
        read_bytes_per_s=parse_bytes_per_s(bandwidth, "--bandwidth") if bandwidth else None,
        card_memory_bytes=0 if no_card else parse_bytes(vram, "--vram") if vram else None,
        link_bytes_per_s=parse_bytes_per_s(pcie, "--pcie") if pcie else None,
    )


def _wish(outline: ModelOutline, context: int | None, prompt: int | None) -> Wish:
    from kt_core.plan import Wish

    longest = outline.max_context
    if longest and context and context > longest:
        msg = f"--context {context} is more than the model was made for: {longest}"
        raise InvalidRequestError(msg)
    context = context or min(max(_DEFAULT_CONTEXT, prompt or 0), longest or _DEFAULT_CONTEXT)
    prompt = prompt or min(_DEFAULT_PROMPT, context)
    if prompt > context:
        msg = f"--prompt {prompt} does not fit into a context of {context}: --context"
        raise InvalidRequestError(msg)
    return Wish(context=context, prompt=prompt)


@contextmanager
def _planner(
    outline: ModelOutline,
    described: Description,
    registry: Registry,
    is_renewed: bool,
    progress: Progress,
) -> Iterator[tuple[Planner, ExpertDevice]]:
    """Open the host's device, which knows how experts are packed, and measure what must be."""
    from kt_core.plan import ExpertRates, Planner
    from kt_core.plan.description import is_this_machine, machine_of
    from kt_core.plan.machine import described_expert_rates
    from kt_core.plan.measure import expert_rates, host_rates

    backend, info = registry.find_device("cpu" if "cpu" in registry.backends else "auto")
    with backend.open(info.name) as device:
        options: dict[str, Any] = {"is_renewed": is_renewed, "progress": progress}
        machine = machine_of(
            described, lambda: host_rates(device, outline.dense_dtype, cache_dir(), **options)
        )
        known: dict[str, ExpertRates] = {}
        heaviest = max(outline.expert_layers, key=lambda layer: layer.spec.weights_per_expert)

        def rates(weight_format: Format) -> ExpertRates:
            if not is_this_machine(described):
                return described_expert_rates(machine.host, weight_format)
            name = weight_format.name
            if name not in known:
                whole = registry.formats.get(name)
                known[name] = expert_rates(device, whole, heaviest, cache_dir(), **options)
            return known[name]

        yield (
            Planner(
                outline=outline,
                machine=machine,
                expert_bytes=device.expert_bytes,
                expert_rates=rates,
            ),
            device,
        )


def _choices(
    weight_format: str,
    dense: Sequence[Format | None],
    registry: Registry,
    device: ExpertDevice,
    stored: StoredFormats,
) -> list[Formats]:
    """Return what the weights may become, best first: experts are packed before dense layers.

    What is quantised on disk comes first, and nothing larger after it. Where layers differ, the
    largest stands for all: a plan has one.
    """
    from kt_core.plan import Formats
    from kt_core.plan.fitting import format_names

    formats = [registry.formats.get(name).descriptor for name in format_names(weight_format)]
    if stored.is_packed and weight_format != "auto" and set(formats) != stored.experts:
        names = ", ".join(sorted(found.name for found in stored.experts))
        msg = (
            f"the experts of this model are packed as {names}, not {weight_format}: leave --format "
            "out, or plan for the original model"
        )
        raise UnsupportedFormatError(msg)
    if weight_format == "auto" and stored.experts:
        largest = _largest(stored.experts)
        bits = largest.bits_per_weight(_MANY_INPUTS)
        smaller = [f for f in formats if f.bits_per_weight(_MANY_INPUTS) < bits]
        formats = [largest] if stored.is_packed else [largest, *smaller]
    possible = [f for f in formats if device.capabilities.computes(f)]
    if not possible:
        msg = f"device {device.info.name!r} computes no experts of format {weight_format!r}"
        raise UnsupportedFormatError(msg)
    return [Formats(experts=f, dense=d) for d in dense for f in possible]


def _leaves_dense(described: Description, registry: Registry) -> bool:
    """Whether the accelerator that is here leaves dense layers to torch; others are assumed not."""
    from kt_core.engine.device_choice import choose_devices

    if described.card_memory_bytes is not None:
        return False
    _, capabilities = choose_devices("auto", registry).dense
    return not capabilities.computes_dense


def _dense_choices(
    name: str, registry: Registry, stored: StoredFormats, *, leaves_dense: bool
) -> list[Format | None]:
    """Return what dense layers may become, best first: what ``kt run`` does, and no more.

    Raises:
        UnsupportedDenseError: A format is asked for on an accelerator that leaves them to torch.
        UnsupportedFormatError: A format is asked for that the packed layers do not have.
    """
    from kt_core.plan.fitting import AUTO_DENSE_FORMATS

    asked_for = None if name in ("auto", "none") else registry.formats.get(name).descriptor
    if leaves_dense:
        if asked_for is not None:
            msg = (
                f"--dense-format {name}: on this accelerator torch computes dense layers, as the "
                "checkpoint has them; leave it out, or plan for the host alone (--vram 0)"
            )
            raise UnsupportedDenseError(msg)
        return [None]
    if stored.dense:
        if asked_for is not None and {asked_for} != stored.dense:
            names = ", ".join(sorted(found.name for found in stored.dense))
            msg = (
                f"the dense layers of this model are packed as {names}, not {name}: leave "
                "--dense-format out, or plan for the original model"
            )
            raise UnsupportedFormatError(msg)
        return [_largest(stored.dense)]
    if stored.is_packed and name == "auto":
        return [None]
    if name != "auto":
        return [asked_for]
    return [
        None if other == "none" else registry.formats.get(other).descriptor
        for other in AUTO_DENSE_FORMATS
    ]


def _largest(formats: Iterable[Format]) -> Format:
    return max(formats, key=lambda found: (found.bits_per_weight(_MANY_INPUTS), found.name))


def _draw(file: Path, model: str, planner: Planner, chosen: Plan, choices: list[Formats]) -> None:
    from kt_core.plan.plot import context_curves, draw, hot_curves

    outline = planner.outline
    longest = outline.max_context or 8 * _DEFAULT_CONTEXT
    share = chosen.hot_experts / outline.num_experts
    alike = [formats for formats in choices if formats.dense == chosen.formats.dense]
    hot = hot_curves(planner, alike, chosen.prompt) if planner.machine.card else []
    context = context_curves(planner, chosen.formats, share, longest)
    draw(file, f"{model}, {chosen.formats.options}", hot, context)


def _show(report: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print_json(report)
        return
    from kt_core.cli.plan_view import show_plan

    show_plan(report)
