"""Run the tests of quantised checkpoints and print what came of each way of storing weights.

``nox -s formats`` runs it. Exits with 1 if a test failed, or if something was not tested at all.
"""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "models")]


# Tests that write a family's own layout, by name.
FUSED = {
    "test_mxfp4_experts_of_a_layer_in_one_tensor": (
        "mxfp4 blocks of a layer (gpt_oss)", "mxfp4", "mxfp4", "transformers reads",
    ),
    "test_fp4_experts_beside_fp8_layers": (
        "fp4 experts, e8m0 (deepseek_v4)", "fp8", "mxfp4", "compressed-tensors reads",
    ),
    "test_fp8_experts_of_a_layer_in_one_tensor": (
        "fp8 experts of a layer", "fp8", "fp8", "compressed-tensors reads",
    ),
}  # fmt: skip


class Results:
    """Counts outcomes by what stands in the brackets of a test's name."""

    def __init__(self) -> None:
        """Start with none."""
        self.outcomes: dict[str, Counter[str]] = defaultdict(Counter)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Take the result of a test, or of what failed before it."""
        if report.when == "call" or report.outcome != "passed":
            test, _, words = report.nodeid.rpartition("::")[2].partition("[")
            self.outcomes[words.removesuffix("]") or test][report.outcome] += 1

    def of(self, word: str) -> str:
        """Return what came of a way of storing weights."""
        outcomes = self.outcomes.get(word)
        return (
            ", ".join(f"{n} {what}" for what, n in outcomes.items()) if outcomes else "NOT TESTED"
        )


def rows(results: Results) -> list[tuple[str, ...]]:
    """Return what is stored, its reader, the format it becomes, the oracle, and the outcome."""
    from checkpoints.schemes import SCHEMES
    from checkpoints.test_gguf_models import CASES
    from kt_checkpoints.gguf.types import GGML_TYPES

    found = []
    for scheme in SCHEMES:
        became = scheme.packed if scheme.is_exact else f"{scheme.packed} (again)"
        reader = str(scheme.config["quant_method"])
        outcome = results.of(scheme.name.replace(" ", "-"))
        found.append((scheme.name, reader, became, scheme.oracle, outcome))
    for test, (stored, reader, became, oracle) in FUSED.items():
        found.append((stored, reader, became, oracle, results.of(test)))
    for kind in GGML_TYPES.values():
        if kind.dtype is None:
            became = kind.packed or f"{kind.nearest} (again)"
            found.append((f"GGUF {kind.name}", "gguf", became, "gguf reads", results.of(kind.name)))
    for name, case in CASES.items():
        if name == case.architecture:
            outcome = results.of(name)
            oracle = "gguf writes, transformers computes"
            found.append((f"GGUF model {name}", "gguf", case.packed, oracle, outcome))
    return found


def main() -> int:
    """Run, print, and return the exit code."""
    results = Results()
    arguments = ["-q", "--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml"), str(HERE)]
    code = pytest.main(arguments, plugins=[results])
    table = Table(
        "stored as", "reader", "becomes", "oracle", "tests", title="quantised checkpoints"
    )
    found = rows(results)
    for row in found:
        table.add_row(*row)
    Console(width=150).print(table)
    return int(code) or any("NOT TESTED" in row for row in found)


if __name__ == "__main__":
    sys.exit(main())
