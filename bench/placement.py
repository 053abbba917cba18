"""How often do placement policies hit, on synthetic and on recorded traces?

``python bench/placement.py [TRACE ...]`` prints tables in Markdown, then JSON. Policies learn from
the first part of a trace (half of a recorded one) and are judged on the rest. ``best static`` is
frequency with the statistics of the judged part itself: no placement that stays could hit more.
Synthetic traces are independent draws by Zipf's law over 24 layers of 64 experts, 6 per token, an
expert as large as one of Qwen3-30B-A3B in int4; where popularity shifts, all of it changes at once,
and hits are counted from 200 tokens after that. ``--cost`` times one step of ``adaptive`` instead.
"""

from __future__ import annotations

import argparse
import json
import statistics as stdlib_statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from kt_core import plugins
from kt_core.interfaces import ExpertGrid, RoutingStatistics
from kt_core.placement.simulate import Simulation, apply_swaps, mask_of, simulate
from kt_core.placement.synthetic import zipf_trace
from kt_core.placement.trace import RoutingTrace, load_trace

POLICIES = ("adaptive", "frequency", "uniform", "front-loading", "random")
# 3 x 2048 x 768 weights (Qwen3-30B-A3B, config.json) of 4.5 bits: int4, a bf16 scale for 32.
WEIGHTS, BYTES = 3 * 2048 * 768, 3 * 2048 * 768 * 9 // 16
GRID = ExpertGrid(num_experts=(64,) * 24, expert_bytes=(BYTES,) * 24)
TOP_K, PART, RELEARN = 6, 1000, 200


@dataclass(frozen=True)
class Case:
    """A trace, what is known at its start, and from which token on hits are counted."""

    name: str
    known: RoutingStatistics
    trace: RoutingTrace
    first: int = 0


def synthetic() -> Iterator[Case]:
    """Popularity that stays, and popularity that shifts."""
    for exponent in (0.4, 0.8, 1.2):
        for name, shifts in (("stays", 0), ("shifts", 1)):
            trace = zipf_trace(
                GRID,
                top_k=TOP_K,
                tokens=3 * PART if shifts == 0 else 4 * PART,
                exponent=exponent,
                seed=round(10 * exponent) + shifts,
                shifts=shifts,
                expert_weights=WEIGHTS,
            )
            known, rest = cut(trace, PART)
            first = 0 if shifts == 0 else PART + RELEARN
            yield Case(f"Zipf {exponent:g}, {name}", known.statistics(), rest, first)


def cut(trace: RoutingTrace, tokens: int) -> tuple[RoutingTrace, RoutingTrace]:
    """Cut a trace of single-token steps anywhere."""

    def part(span: slice) -> RoutingTrace:
        return replace(
            trace,
            expert_ids=trace.expert_ids[span],
            step_tokens=trace.step_tokens[span],
            step_is_decode=trace.step_is_decode[span],
            prompt_steps=np.array([0]),
        )

    return part(slice(0, tokens)), part(slice(tokens, None))


def recorded(files: list[Path]) -> Iterator[Case]:
    """Traces of models: learned from the first half, judged on the second."""
    for file in files:
        first, rest = load_trace(file).split(0.5)
        yield Case(file.stem, first.statistics(), rest)


def judge(case: Case, fractions: list[float]) -> list[dict[str, Any]]:
    """Run every policy at every residency, and print the table."""
    registry = plugins.load()
    oracle = cut_from(case).statistics()
    rows: dict[str, list[float]] = {}
    found = []
    for name in (*POLICIES, "best static"):
        policy = registry.policies.get("frequency" if name == "best static" else name)
        known = oracle if name == "best static" else case.known
        rows[name] = []
        for hot in fractions:
            run = simulate(policy, case.trace, hot_fraction=hot, statistics=known)
            found.append(describe(case, name, run))
            rows[name].append(found[-1]["hit_rate"])
    sys.stdout.write(f"\n{case.name}: hit rate, %\n\n")
    sys.stdout.write("| hot | " + " | ".join(f"{hot:.0%}" for hot in fractions) + " |\n")
    sys.stdout.write("|---" * (len(fractions) + 1) + "|\n")
    for name, rates in rows.items():
        sys.stdout.write(f"| {name} | " + " | ".join(f"{100 * r:.1f}" for r in rates) + " |\n")
    gains = [a - b for a, b in zip(rows["adaptive"], rows["frequency"], strict=True)]
    sys.stdout.write("| adaptive - frequency | ")
    sys.stdout.write(" | ".join(f"{100 * gain:+.1f}" for gain in gains) + " |\n")
    sys.stdout.flush()
    return found


def cut_from(case: Case) -> RoutingTrace:
    """The part of the trace on which hits are counted."""
    return cut(case.trace, case.first)[1] if case.first else case.trace


def describe(case: Case, name: str, run: Simulation) -> dict[str, Any]:
    """Return one result; the link must not have carried more than it could."""
    assert (run.moved_bytes <= run.granted_bytes).all()
    return {
        "case": case.name,
        "policy": name,
        "hot_fraction": run.hot_fraction,
        "hit_rate": run.hit_rate(first=case.first),
        "moved_bytes_per_step": float(run.moved_bytes.mean()),
        "granted_bytes_per_step": float(run.granted_bytes.mean()),
        "decode_tokens_per_s": run.tokens_per_s(is_decode=True),
    }


def cost(steps: int = 600) -> dict[str, Any]:
    """Time ``adaptive`` on 60 layers of 256 experts, 8 per token, with a shift half-way."""
    grid = ExpertGrid(num_experts=(256,) * 60, expert_bytes=(BYTES,) * 60)
    trace = zipf_trace(grid, top_k=8, tokens=steps, exponent=0.8, seed=0, shifts=1)
    policy = plugins.load().policies.get("adaptive")
    budget = grid.total_bytes // 4
    known = RoutingStatistics.unknown(grid)
    resident = mask_of(policy.place(known, budget, grid), grid)
    online = policy.online(known, budget, grid)
    assert online is not None
    times, swaps = [], 0
    for step in range(steps):
        counts = trace.counts(step, step + 1)
        start = time.perf_counter()
        answer = online.observe(counts, resident, tokens=1, link_bytes=16 * BYTES)
        times.append(1e6 * (time.perf_counter() - start))
        apply_swaps(answer, resident)
        swaps += len(answer)
    quantiles = stdlib_statistics.quantiles(times, n=20)
    return {"median_us": quantiles[9], "p95_us": quantiles[18], "steps": steps, "swaps": swaps}


def main() -> None:
    """Judge the policies, or time one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("traces", nargs="*", type=Path, help="files that kt trace wrote")
    parser.add_argument("--no-synthetic", action="store_true")
    parser.add_argument("--cost", action="store_true", help="time adaptive instead")
    options = parser.parse_args()
    if options.cost:
        sys.stdout.write(json.dumps(cost(), indent=2) + "\n")
        return
    fractions = [percent / 100 for percent in range(10, 100, 10)]
    cases = [*recorded(options.traces), *([] if options.no_synthetic else synthetic())]
    results = [result for case in cases for result in judge(case, fractions)]
    sys.stdout.write("\n" + json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
