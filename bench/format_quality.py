"""What does each format cost in quality, and what do the search and a calibration text give back?

The source reads a text once; then the model is packed in each format by each method, as `kt quant`
does it, reads the same text, and is removed. Prints JSON: perplexity, KL divergence from the source
and their standard errors. Two methods for one format are compared token by token (paired), since
tokens differ from each other far more than methods do.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

# As the command line sets it, before torch is imported: kt_core.cli.main.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

METHODS = ("rtn", "search", "calibrated")


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield a row for each format and method."""
    from kt_core import plugins
    from kt_core.engine.calibration import Calibration, calibrate
    from kt_core.engine.evaluation import Comparison, source_predictions, standard_error
    from kt_core.engine.model_files import resolve_model
    from kt_core.engine.quantize import quantize
    from kt_core.engine.quantize_expert import Method
    from kt_core.engine.quantize_plan import plan_quantization
    from kt_core.interfaces import no_progress

    registry = plugins.load()
    source = resolve_model(options.model, registry, no_progress)
    shared: dict[str, Any] = {"threads": options.threads, "progress": no_progress}
    with tempfile.TemporaryDirectory(prefix="kt-quality-", dir=options.temporary) as name:
        folder = Path(name)
        calibration: Calibration | None = None
        if options.calibrate:
            text = options.calibrate.read_text(encoding="utf-8")
            calibration = calibrate(source, text, folder / "calibration", registry, **shared)
        text = options.text.read_text(encoding="utf-8")
        with source_predictions(
            source, text, folder, registry, tokens=options.tokens, **shared
        ) as predictions:
            for weight_format in options.formats or _all_formats(registry):
                compared: dict[str, Comparison] = {}
                for method in options.methods:
                    target = folder / "packed"
                    plan = plan_quantization(
                        source, registry, weight_format=weight_format, method=method
                    )
                    is_calibrated = method == "calibrated"
                    report = quantize(
                        plan,
                        target,
                        method=Method.SEARCH if is_calibrated else Method(method),
                        calibrator=_given(calibration) if is_calibrated else None,
                        **shared,
                    )
                    compared[method] = predictions.compare(target, registry, **shared)
                    _remove(target)
                    yield {
                        "format": weight_format,
                        "method": method,
                        "bits_per_weight": report.layers[0].bits_per_weight,
                        "quantising_s": round(report.seconds, 1),
                        **asdict(compared[method].summary()),
                        "paired": {
                            other: _paired(compared[method], before, standard_error)
                            for other, before in compared.items()
                            if other != method
                        },
                    }


def _paired(found: Any, other: Any, standard_error: Any) -> dict[str, float]:
    """How much less the divergence is than another method's, and how sure that is."""
    difference = found.divergence - other.divergence
    mean = float(other.divergence.mean())
    return {
        "kl_change": float(difference.mean()) / mean,
        "kl_change_error": standard_error(difference) / mean,
    }


def _given(calibration: Any) -> Any:
    if calibration is None:
        sys.exit("the method calibrated needs --calibrate TEXT")
    return lambda _: calibration


def _all_formats(registry: Any) -> list[str]:
    return [weight_format.descriptor.name for weight_format in registry.formats]


def _remove(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()


def machine() -> dict[str, Any]:
    """Return what the numbers were measured on."""
    from kt_core import hardware

    return {"cpu": hardware.detect().cpu.name, "system": platform.platform()}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", help="a directory, or `demo`")
    parser.add_argument("--text", type=Path, required=True, help="what is foretold")
    parser.add_argument("--calibrate", type=Path, help="another text, for the method calibrated")
    parser.add_argument("--tokens", type=int, default=4096, help="of the text")
    parser.add_argument("--formats", type=lambda words: words.split(","), help="all by default")
    parser.add_argument(
        "--methods", type=lambda words: words.split(","), default=["search"], help=str(METHODS)
    )
    parser.add_argument("--threads", type=int)
    parser.add_argument("--temporary", type=Path, help="folder for packed models")
    options = parser.parse_args(arguments)
    if unknown := set(options.methods) - set(METHODS):
        parser.error(f"unknown methods: {', '.join(sorted(unknown))}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and print JSON; a line on standard error for each row as it comes."""
    options = parse(arguments)
    start, rows = time.perf_counter(), []
    for row in measure(options):
        rows.append(row)
        sys.stderr.write(
            f"{row['format']:18} {row['method']:10} ppl {row['perplexity']:.4f} "
            f"kl {row['kl']:.6f} +- {row['kl_error']:.6f}  {row['paired']}\n"
        )
    report = {"rows": rows, "seconds": round(time.perf_counter() - start), "machine": machine()}
    sys.stdout.write(json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
