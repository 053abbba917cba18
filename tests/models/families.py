"""Compare every MoE family of the installed transformers with our engine, on tiny checkpoints.

``python tests/models/families.py --json OUT.json --markdown docs/families.md`` runs them all;
``--only a,b`` some; ``--upstream-only`` checks the checkpoints themselves, without our engine.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import tiny
import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

TOLERANCE = 2e-6
"""Largest max|d| / max|logit| of a float32 run that counts as a match."""

SMALLEST_EFFECT = 1e-3
"""A checkpoint whose logits change by less than this without its experts would test nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What became of one family.

    Attributes:
        family: folder in ``transformers/models``.
        auto_class: Auto class that loads it.
        model_class: class that it loads.
        experts_classes: classes of its experts modules.
        is_decorated: whether those carry ``@use_experts_implementation``.
        num_experts_modules: how many such modules the model has.
        num_experts_modules_run: how many of them a text runs through; the others belong to images
            or speech and the comparison does not see them.
        difference: max|d| / max|logit| against the reference, None if it did not run.
        is_greedy_equal: whether greedy tokens are the same, None if the model writes none.
        reason: why it does not match, None if it does.
        duration_s: seconds that the whole check took.
    """

    family: str
    auto_class: str = ""
    model_class: str = ""
    experts_classes: tuple[str, ...] = ()
    is_decorated: bool = False
    num_experts_modules: int = 0
    num_experts_modules_run: int = 0
    difference: float | None = None
    is_greedy_equal: bool | None = None
    reason: str | None = "not run"
    duration_s: float = 0.0

    @property
    def matches(self) -> bool:
        return self.reason is None


def check(family: str, *, upstream_only: bool) -> Result:
    """Build, save and load one family and compare; whatever it raises becomes the reason."""
    start = time.perf_counter()
    result = Result(family=family)
    with tempfile.TemporaryDirectory(prefix="kt-families-") as directory:
        try:
            model = tiny.save_tiny(family, directory)
            result = _describe(result, model)
            reference = tiny.load_reference(directory)
            if upstream_only:
                result = _compare(result, reference, model)
                result = _check_experts_matter(result, model)
            else:
                with _load_engine(directory) as loaded:
                    result = _compare(result, loaded, reference)
        # One family's failure is one row of the table: whatever a model's or our own code raises
        # is recorded there, and the other families still run.
        except Exception as error:  # noqa: BLE001
            message = str(error).replace(directory, "DIRECTORY").strip()
            first_line = message.splitlines()[0] if message else ""
            result = replace(result, reason=f"{type(error).__name__}: {first_line}")
    return replace(result, duration_s=round(time.perf_counter() - start, 3))


@contextmanager
def _load_engine(directory: str) -> Iterator[PreTrainedModel]:
    import kt_core  # --upstream-only must not need it

    with kt_core.load(directory, format="bf16", device="cpu", dtype=torch.float32) as engine:
        yield engine.model


def _describe(result: Result, model: PreTrainedModel) -> Result:
    experts = _experts_modules(model)
    run = set()
    hooks = [e.register_forward_pre_hook(lambda module, _: run.add(id(module))) for e in experts]
    tiny.logits(model, tiny.sample_input_ids(model.config))
    for hook in hooks:
        hook.remove()
    return replace(
        result,
        auto_class=tiny.auto_class(model.config).__name__,
        model_class=type(model).__name__,
        experts_classes=tuple(sorted({type(module).__name__ for module in experts})),
        is_decorated=bool(experts) and all(map(_is_decorated, experts)),
        num_experts_modules=len(experts),
        num_experts_modules_run=len(run),
    )


def _experts_modules(model: PreTrainedModel) -> list[nn.Module]:
    """List the routed experts: what is decorated, else what is called so."""
    modules = list(model.modules())
    decorated = [m for m in modules if _is_decorated(m)]
    return decorated or [m for m in modules if type(m).__name__.endswith("Experts")]


def _is_decorated(module: nn.Module) -> bool:
    return hasattr(module, "is_concatenated") and hasattr(module, "is_transposed")


def _compare(result: Result, model: PreTrainedModel, reference: PreTrainedModel) -> Result:
    input_ids = tiny.sample_input_ids(reference.config)
    want, got = tiny.logits(reference, input_ids), tiny.logits(model, input_ids)
    difference = _relative_difference(got, want)
    want_tokens = tiny.greedy_tokens(reference, input_ids)
    is_greedy_equal = None
    if want_tokens is not None:
        got_tokens = tiny.greedy_tokens(model, input_ids)
        is_greedy_equal = got_tokens is not None and torch.equal(got_tokens, want_tokens)
    reason = None
    if not difference <= TOLERANCE:  # so written, NaN fails too
        reason = f"logits differ by {difference:.1e} of the largest, allowed {TOLERANCE:.0e}"
    elif is_greedy_equal is False:
        reason = "greedy tokens differ"
    return replace(result, difference=difference, is_greedy_equal=is_greedy_equal, reason=reason)


@torch.no_grad()
def _check_experts_matter(result: Result, model: PreTrainedModel) -> Result:
    input_ids = tiny.sample_input_ids(model.config)
    want = tiny.logits(model, input_ids)
    for module in _experts_modules(model):
        for parameter in module.parameters():
            parameter.zero_()
    effect = _relative_difference(tiny.logits(model, input_ids), want)
    if result.matches and not effect >= SMALLEST_EFFECT:
        return replace(result, reason=f"without experts the logits change by {effect:.1e} only")
    return result


def _relative_difference(got: Tensor, want: Tensor) -> float:
    return ((got - want).abs().max() / want.abs().max()).item()


def _status(result: Result) -> str:
    if result.matches:
        return "matches"
    return f"does not run: {(result.reason or '').partition(':')[0]}"


def _count_line(results: Sequence[Result]) -> str:
    return f"{sum(result.matches for result in results)} of {len(results)} families match"


def markdown(results: Sequence[Result]) -> str:
    """Write the table; the same results give the same text."""
    lines = [
        "# Model families",
        "",
        f"Every MoE family of transformers {transformers.__version__}, as tiny random checkpoints:",
        "our engine (format bf16, float32 run, CPU) against transformers' own experts. A family",
        f"matches if no logit is off by more than {TOLERANCE:.0e} of the largest and six greedy",
        "tokens are the same. Written by `python tests/models/families.py`; do not edit.",
        "",
        f"**{_count_line(results)}.**",
        "",
        "Where a text runs through some of the experts modules only, the others belong to images",
        "or speech and are not compared.",
        "",
        r"| family | Auto class: model | experts, modules run | decorated "
        r"| max\|d\| / max\|logit\| | result |",
        "|---|---|---|---|---|---|",
    ]
    for r in results:
        experts = ", ".join(r.experts_classes)
        difference = "-" if r.difference is None else f"{r.difference:.1e}"
        cells = (
            r.family,
            f"{r.auto_class}: {r.model_class}" if r.auto_class else "-",
            f"{experts}, {r.num_experts_modules_run} of {r.num_experts_modules}",
            "yes" if r.is_decorated else "no",
            difference,
            "matches" if r.reason is None else r.reason.replace("|", r"\|"),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Check the families and return 1 if fewer than ``--minimum`` match."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--markdown", type=Path, help="write the table here")
    parser.add_argument("--status", type=Path, help="write what `kt models` shows here")
    parser.add_argument("--only", help="families to check, separated by commas")
    parser.add_argument("--upstream-only", action="store_true", help="without our engine")
    parser.add_argument("--minimum", type=int, default=0, help="exit with 1 if fewer match")
    options = parser.parse_args(arguments)
    known = tiny.moe_model_types()
    families = sorted(options.only.split(",")) if options.only else known
    if unknown := sorted(set(families) - set(known)):
        parser.error(f"no such families: {', '.join(unknown)}")
    if options.markdown and options.upstream_only:
        parser.error("--markdown is the table of our engine, which --upstream-only does not run")

    torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other
    logging.getLogger("transformers").setLevel(logging.ERROR)
    silence: Callable[[], None] = transformers.utils.logging.disable_progress_bar
    silence()
    results = []
    for family in families:
        result = check(family, upstream_only=options.upstream_only)
        sys.stdout.write(f"{family}: {result.reason or 'matches'} ({result.duration_s:.2f} s)\n")
        sys.stdout.flush()
        results.append(result)
    if options.json:
        document = {
            "transformers": transformers.__version__,
            "compared": "transformers" if options.upstream_only else "kt",
            "tolerance": TOLERANCE,
            "families": [asdict(result) | {"matches": result.matches} for result in results],
        }
        options.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    if options.status:
        status = {r.family: _status(r) for r in results}
        text = json.dumps({"transformers": transformers.__version__, "families": status}, indent=1)
        options.status.write_text(text + "\n", encoding="utf-8")
    if options.markdown:
        options.markdown.write_text(markdown(results), encoding="utf-8")
    sys.stdout.write(_count_line(results) + "\n")
    return int(sum(result.matches for result in results) < options.minimum)


if __name__ == "__main__":
    sys.exit(main())
