"""What `kt quant` does, in order: decide, calibrate, quantise, compare."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from kt_core.engine.calibration import Calibration, calibrate
from kt_core.engine.evaluation import evaluate
from kt_core.engine.model_files import resolve_model
from kt_core.engine.quantize import check_target, quantize, unfinished
from kt_core.engine.quantize_expert import Method
from kt_core.engine.quantize_overrides import NO_FORMAT
from kt_core.engine.quantize_plan import plan_quantization
from kt_core.engine.quantize_report import QuantReport
from kt_core.engine.text_windows import read_text
from kt_core.errors import InvalidRequestError
from kt_core.interfaces import Progress
from kt_core.plugins import Registry


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What was asked for; in the words of the command line."""

    weight_format: str
    dense_format: str = "none"
    method: str = "search"
    overrides: Mapping[str, str] = field(default_factory=dict)
    calibrate: Path | None = None
    evaluate: Path | None = None
    threads: int | None = None


def run(
    source: str,
    target: Path,
    registry: Registry,
    options: Options,
    *,
    progress: Progress,
    remark: Callable[[str], None],
) -> QuantReport:
    """Quantise a model; errors as ``quantize`` and ``load``.

    Raises:
        InvalidRequestError: An option is wrong.
    """
    if options.method not in list(Method):
        msg = f"--method {options.method!r} is unknown; there are: {', '.join(Method)}"
        raise InvalidRequestError(msg)
    if options.weight_format == "auto":
        msg = "--format auto is for running: say what the experts shall become"
        raise InvalidRequestError(msg)
    registry.formats.get(options.weight_format)  # unknown ones fail before anything is fetched
    if options.dense_format != NO_FORMAT:
        registry.formats.get(options.dense_format)
    check_target(target)
    texts = {
        name: read_text(file, name)
        for name, file in (("--calibrate", options.calibrate), ("--eval", options.evaluate))
        if file is not None
    }
    directory = resolve_model(source, registry, progress)
    plan = plan_quantization(
        directory,
        registry,
        weight_format=options.weight_format,
        method=_described(options.method, texts.get("--calibrate")),
        overrides=options.overrides,
        dense_format=options.dense_format,
    )
    if unfinished(target).exists():
        remark(f"going on with {unfinished(target)}, which an earlier run left")
    threads = options.threads

    def calibrator(folder: Path) -> Calibration:
        return calibrate(
            directory, texts["--calibrate"], folder, registry, threads=threads, progress=progress
        )

    report = quantize(
        plan,
        target,
        method=Method(options.method),
        calibrator=calibrator if options.calibrate else None,
        threads=threads,
        progress=progress,
    )
    if options.evaluate:
        report.evaluation = evaluate(
            directory, target, texts["--eval"], registry, threads=threads, progress=progress
        )
    return report


def _described(method: str, calibration: str | None) -> str:
    """Say in config.json how it was done; another text is another job."""
    if calibration is None:
        return method
    digest = hashlib.sha256(calibration.encode()).hexdigest()[:16]
    return f"{method}, compensated on a text of SHA-256 {digest}..."
