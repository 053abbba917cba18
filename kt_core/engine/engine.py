"""``kt_core.load`` and what it returns."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeAlias, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kt_core import hardware, plugins
from kt_core.checkpoint import PackedDirectory
from kt_core.engine import load_options
from kt_core.engine.accelerators import (
    Accelerators,
    HotExpertsWish,
    known_statistics,
    remember_statistics,
)
from kt_core.engine.chat import prompt_tokens
from kt_core.engine.dense_layers import DenseLayers
from kt_core.engine.dense_loading import DenseLoader
from kt_core.engine.dense_mapping import MappedDense
from kt_core.engine.dense_unpacking import UnpackedDense
from kt_core.engine.device_choice import choose_devices
from kt_core.engine.device_time import StepClock
from kt_core.engine.expert_formats import formats_name
from kt_core.engine.forward_passes import ForwardPasses
from kt_core.engine.generation import Completion, GenerationOptions, TokenEvent, TokenStream
from kt_core.engine.loading import ExpertLoader, load_model
from kt_core.engine.model_files import adapters_for, model_config, resolve_model
from kt_core.engine.outline import outline_model
from kt_core.engine.packed_cache import cached
from kt_core.engine.packed_loading import (
    check_asked_format,
    check_packed_dense,
    computes_all,
    find_packed,
)
from kt_core.engine.prefix_cache import PrefixCache
from kt_core.engine.stats import EngineStats, accelerator_stats
from kt_core.engine.stored_checkpoint import open_model
from kt_core.engine.text_stream import Decoder, TextStream
from kt_core.errors import (
    InvalidRequestError,
    TokenizerError,
)
from kt_core.interfaces import ExpertDevice, ExpertKernel, Progress, no_progress
from kt_core.plan import ModelOutline
from kt_core.plugins import Registry
from kt_core.types import ActivationPrecision, Format

_CLOSED = "the engine is closed; load the model again"

Message: TypeAlias = Mapping[str, str]
Prompt: TypeAlias = str | Sequence[Message]


def load(
    model: str | Path,
    *,
    format: str = "auto",
    device: str = "auto",
    threads: int | None = None,
    dtype: torch.dtype | str = "auto",
    precision: ActivationPrecision | str = ActivationPrecision.AUTO,
    dense_format: str = "none",
    cache: bool = False,
    hot_experts: str = "auto",
    placement: str = "adaptive",
    accelerator_memory: int | None = None,
    defer: int = 0,
    graph: bool = True,
    registry: Registry | None = None,
    progress: Progress = no_progress,
) -> Engine:
    """Load a Mixture-of-Experts model.

    Args:
        model: A model directory, a GGUF file, a registered name such as ``demo``, or a hub id.
        format: Weight format of the routed experts; ``auto`` takes the first of bf16, int8 and
            int4 that fits into memory, and leaves experts that are quantised as they are.
        device: Where the model runs; ``auto`` takes the best there is. An accelerator, or several
            (``cuda:0,1``), hold the dense part and hot experts; the host computes the others.
        threads: Host threads for the experts and for torch; None for one per physical core.
        dtype: Type of the dense part; ``auto`` follows the checkpoint.
        precision: What hidden states become before they meet packed weights.
        dense_format: Weight format of attention, dense MLPs, shared experts and the output head,
            which are then computed by the device, too; ``none`` leaves them as they are: packed
            where `kt quant` packed them, else to torch as the checkpoint has them. Routers, norms
            and embeddings always stay. On accelerators torch computes them all: what is packed
            is unpacked there, a format is refused.
        cache: Pack the experts into ``$XDG_CACHE_HOME/kt/packed`` first, where the next start
            finds them; ``format`` must be named.
        hot_experts: Experts on accelerators: ``auto`` for as many as fit, a number, or a share
            such as ``25%``.
        placement: The policy that chooses them.
        accelerator_memory: Bytes of each accelerator that may be used; None for all.
        defer: Pairs that each token may put off to the next layer, of those that the host
            computes; see ``kt_core.moe.deferral``. It changes the answer.
        graph: Capture a step of decoding on an accelerator, and replay it for each token, where
            device and model can: see ``EngineStats.decode``.
        registry: The plug-ins; None loads the installed ones.
        progress: Told how far loading has come.

    Raises:
        kt_core.errors.KtError: Anything that is the user's to fix; nothing is left behind.
    """
    start = time.perf_counter()
    registry = registry or plugins.load()
    chosen_precision = load_options.precision_of(precision)
    load_options.check_threads(threads)
    if format != "auto":
        registry.formats.get(format)  # an unknown name fails before anything is fetched
    if defer < 0:
        msg = f"defer must be >= 0, got {defer}"
        raise InvalidRequestError(msg)
    devices = choose_devices(device, registry)
    dense_type = load_options.dense_format_of(dense_format, registry, devices)
    policy = registry.policies.get(placement)
    directory = resolve_model(model, registry, progress)
    packed_experts = find_packed(directory, registry)
    if cache and packed_experts is None:
        directory = cached(directory, registry, format, threads, progress)
        packed_experts = find_packed(directory, registry)
    if packed_experts:
        check_asked_format(packed_experts, format, registry)
        check_packed_dense(packed_experts, dense_type, devices)
    stored = open_model(directory, registry)
    config_dict = dict(stored.config)
    config = model_config(directory, config_dict, registry)
    tokenizer = stored.tokenizer(config)
    opened = devices.open_host(threads)
    accelerators: Accelerators | None = None
    try:
        if devices.accelerators:
            wish = HotExpertsWish(
                hot_experts=hot_experts,
                memory_bytes=accelerator_memory,
                policy=policy,
                statistics=known_statistics(directory),
            )
            accelerators = Accelerators(devices.open_accelerators(), opened, wish, chosen_precision)
            accelerators.hybrid.deferral.per_token = defer
        dense = _dense_layers(opened, accelerators, dense_type, packed_experts, chosen_precision)
        if accelerators is not None:
            progress("measuring the model", None)
            outline = outline_model(directory, registry)
            saved = _saved_dense_bytes(outline, dense, dense_type)
            advice = _about_dense(dense, accelerators.devices[0])
            accelerators.make_room(outline, saved, graph=graph, advice=advice)
        loader = ExpertLoader(
            checkpoint=stored.checkpoint,
            adapters=adapters_for(config_dict["model_type"], registry),
            device=opened,
            registry=registry,
            format_name=format,
            precision=chosen_precision,
            progress=progress,
            dense=dense,
            packed=packed_experts,
            accelerators=accelerators,
        )
        loaded = load_model(directory, config, loader, dtype)
    except BaseException:
        if accelerators is not None:
            accelerators.close()
        opened.close()
        raise
    if threads is not None:
        torch.set_num_threads(threads)
    return Engine(
        loaded,
        tokenizer,
        directory=directory,
        loader=loader,
        device=opened,
        load_s=time.perf_counter() - start,
        graph=graph,
    )


def _dense_layers(
    host: ExpertDevice,
    accelerators: Accelerators | None,
    weight_format: Format | None,
    packed: PackedDirectory | None,
    precision: ActivationPrecision,
) -> DenseLayers | None:
    device = accelerators.devices[0] if accelerators else host
    if packed is not None and packed.config.dense:
        if computes_all(device.capabilities, packed.config.dense_formats):
            return MappedDense(device, packed, precision)
        assert accelerators is not None
        return UnpackedDense(packed, accelerators.torch_device, device.info.name)
    if weight_format is None:
        return None
    return DenseLoader(device, weight_format, precision, host=host)


def _saved_dense_bytes(
    outline: ModelOutline, dense: DenseLayers | None, weight_format: Format | None
) -> int:
    """Return by how much packed dense layers make the model smaller than its outline says."""
    if isinstance(dense, MappedDense):
        return dense.packed.config.saved_dense_bytes(outline.dense_element_bytes)
    return outline.saved_bytes(weight_format) if dense else 0


def _about_dense(dense: DenseLayers | None, device: ExpertDevice) -> str:
    """Say what to know of the dense part where there is no room for it; maybe nothing."""
    if isinstance(dense, UnpackedDense):
        return "its packed layers are unpacked there, for torch; "
    if dense is None and device.capabilities.computes_dense:
        return "pack it (--dense-format int8), "
    return ""


class Engine:
    """A loaded model. Use it as a context manager, or call ``close``.

    Attributes:
        tokenizer: The model's tokenizer; None where the directory has none.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        *,
        directory: Path,
        loader: ExpertLoader,
        device: ExpertDevice,
        load_s: float,
        graph: bool = True,
    ) -> None:
        """Made by ``load``."""
        self._model: PreTrainedModel | None = model
        self.tokenizer = tokenizer
        self._directory = directory
        self._loader = loader
        self._device = device
        self._load_s = load_s
        self._prefixes = PrefixCache()
        self._clock = StepClock(device)
        self._passes: ForwardPasses | None = ForwardPasses(
            model, loader.accelerators, graph=graph, clock=self._clock
        )

    @property
    def model(self) -> PreTrainedModel:
        """The transformers model; ``engine.model(input_ids=...).logits`` works.

        Raises:
            InvalidRequestError: The engine is closed.
        """
        if self._model is None:
            raise InvalidRequestError(_CLOSED)
        return self._model

    @property
    def passes(self) -> ForwardPasses:
        """How the model is called: eagerly, or from graphs.

        Raises:
            InvalidRequestError: The engine is closed.
        """
        if self._passes is None:
            raise InvalidRequestError(_CLOSED)
        return self._passes

    @property
    def accelerators(self) -> Accelerators | None:
        """The accelerators and what lies on them; None where the host does it all."""
        return self._loader.accelerators

    @property
    def kernels(self) -> list[ExpertKernel]:
        """Who computes the experts, by layer; layers that share experts have one.

        The host's, where there are accelerators, too.
        """
        return [loaded.kernel for loaded in self._loader.sites]

    def encode(self, prompt: Prompt, *, raw: bool = False) -> list[int]:
        """Return the tokens of a prompt.

        Args:
            prompt: A text, or messages with ``role`` and ``content``.
            raw: Take a text as it is; otherwise it becomes a user's message in the chat template.

        Raises:
            TokenizerError: There is no tokenizer, or no chat template for messages.
        """
        return prompt_tokens(self._require_tokenizer(), prompt, raw=raw)

    def stream(
        self, prompt: Prompt | Sequence[int], *, raw: bool = False, **options: Any
    ) -> Iterator[TokenEvent]:
        """Answer a prompt, token by token.

        Args:
            prompt: A text, messages, or token ids.
            raw: As in ``encode``.
            options: Fields of ``GenerationOptions``.

        Yields:
            One event per token, then a last one with ``finish_reason`` and ``timing``.

        Raises:
            ContextLengthError: The prompt is longer than the model's context.
            InvalidRequestError: An option is out of range.
            TokenizerError: As for ``encode``.
        """
        chosen = _options(options)
        tokenizer = self._require_tokenizer()
        is_tokens = not isinstance(prompt, str) and all(isinstance(p, int) for p in prompt)
        tokens = list(prompt) if is_tokens else self.encode(prompt, raw=raw)  # type: ignore[arg-type]
        stream = self._tokens(tokens, chosen)  # type: ignore[arg-type]
        return _events(stream, TextStream(cast("Decoder", tokenizer), chosen.stop))

    def stream_tokens(self, prompt: Sequence[int], **options: Any) -> TokenStream:
        """Answer token ids with token ids: for models without a tokenizer.

        Args:
            prompt: Token ids.
            options: Fields of ``GenerationOptions``; ``stop`` is of no use here.

        Returns:
            What yields one token after the other; ``timing`` and ``finish_reason`` are set then.

        Raises:
            ContextLengthError: As for ``stream``, as is the next one.
            InvalidRequestError: An option is out of range.
        """
        return self._tokens(prompt, _options(options))

    def _tokens(self, prompt: Sequence[int], options: GenerationOptions) -> TokenStream:
        accelerators = self._loader.accelerators
        after_step = accelerators.after_step if accelerators else None
        return TokenStream(
            self.model, prompt, options, self._prefixes, after_step, passes=self.passes
        )

    def generate(
        self, prompt: Prompt | Sequence[int], *, raw: bool = False, **options: Any
    ) -> Completion:
        """Answer a prompt and return the whole answer; arguments and errors as for ``stream``."""
        tokens: list[int] = []
        text = ""
        for event in self.stream(prompt, raw=raw, **options):
            text += event.text
            if event.token is not None:
                tokens.append(event.token)
        assert event.finish_reason is not None
        assert event.timing is not None
        return Completion(
            text=text,
            token_ids=tuple(tokens),
            finish_reason=event.finish_reason,
            timing=event.timing,
        )

    def stats(self) -> EngineStats:
        """Return how the model was loaded, and what has happened since."""
        loader = self._loader
        device = loader.device
        sites = [loaded.site for loaded in loader.sites]
        kernels = [loaded.kernel for loaded in loader.sites]
        dense = loader.dense
        first = loader.accelerators.devices[0] if loader.accelerators else None
        return EngineStats(
            model=str(self._directory),
            model_type=self.model.config.model_type,
            format=formats_name(loader.formats.values()),
            device=device.info.name,
            isa=device.capabilities.instruction_set,
            threads=device.threads,
            dtype=str(self.model.dtype).removeprefix("torch."),
            placement=loader.accelerators.placement_counts()
            if loader.accelerators
            else {device.info.name: sum(site.spec.num_experts for site in sites)},
            accelerators=accelerator_stats(loader.accelerators) if loader.accelerators else None,
            decode=self.passes.stats(),
            steps_s=self._clock.steps_s,
            time_by_device=self._clock.times(first),
            expert_layers=len(sites),
            expert_bytes=sum(k.bytes_per_expert * k.spec.num_experts for k in kernels),
            dense_format=formats_name(dense.formats) if dense and dense.formats else "none",
            dense_layers=len(dense.layers) if dense else 0,
            dense_bytes=sum(p.numel() * p.element_size() for p in self.model.parameters())
            + (dense.packed_bytes if dense else 0),
            load_s=self._load_s,
            peak_memory_bytes=hardware.process_memory().peak_rss_bytes,
        )

    def close(self) -> None:
        """Let the model go, and stop the threads. Closing twice does nothing.

        Whoever still holds ``engine.model`` holds its experts and their threads, too.
        """
        self._prefixes.close()
        if self._passes is not None:
            self._passes.is_on = False  # a stream under way must not call what is closed
            self._passes = None
        self._model = None
        self._loader.sites.clear()
        if (accelerators := self._loader.accelerators) is not None:
            self._loader.accelerators = None
            remember_statistics(self._directory, accelerators)
            accelerators.close()
        self._device.close()

    def __enter__(self) -> Self:
        """Return self; leaving the block closes the engine."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the engine."""
        self.close()

    def _require_tokenizer(self) -> PreTrainedTokenizerBase:
        if self.tokenizer is None:
            msg = (
                f"{self._directory} has no tokenizer (tokenizer.json or tokenizer.model): copy it "
                "from the original model. engine.model runs without, on token ids."
            )
            raise TokenizerError(msg)
        return self.tokenizer


def _options(options: Mapping[str, Any]) -> GenerationOptions:
    try:
        chosen = GenerationOptions(**options)
    except TypeError as error:
        known = ", ".join(GenerationOptions.__dataclass_fields__)
        msg = f"unknown option among {sorted(options)}; there are: {known}"
        raise InvalidRequestError(msg) from error
    return chosen


def _events(tokens: TokenStream, text: TextStream) -> Iterator[TokenEvent]:
    # Closed by name: Python before 3.12.4 may keep it open when this generator is closed.
    with contextlib.closing(iter(tokens)) as stream:
        for token in stream:
            yield TokenEvent(token=token, text=text.push(token))
            if text.is_stopped:
                tokens.finish_reason = "stop"
                break
    rest = text.finish()
    reason = "stop" if text.is_stopped else tokens.finish_reason
    yield TokenEvent(token=None, text=rest, finish_reason=reason, timing=tokens.timing)
