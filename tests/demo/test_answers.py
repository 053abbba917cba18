"""The demo model in every format: does it still make sense?

Fetches the model once; `nox -s answers` runs it, and ends with what was answered.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

import kt_core
from kt_core.quant import BUILT_IN_FORMATS

QUESTION = "What is the capital of France?"

pytestmark = [pytest.mark.network, pytest.mark.slow]


@pytest.mark.parametrize("name", [f.descriptor.name for f in BUILT_IN_FORMATS])
def test_the_capital_of_france(name: str, record_property: Callable[[str, object], None]) -> None:
    with kt_core.load("demo", format=name) as engine:
        answer = engine.generate(QUESTION, temperature=0, max_new_tokens=40)
    record_property("answer", (name, answer.text.strip()))
    assert "Paris" in answer.text
