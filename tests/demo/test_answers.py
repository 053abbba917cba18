"""The demo model in every format: does it still make sense?

Fetches the model once; ``nox -s answers`` runs it, and ends with what was answered. The questions
are ones on which the model in bf16 is not of two minds. On "What is the capital of France?" its
first word is "The" by one step of bf16 over "L'": rounding decides whether it goes on in French.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

import kt_core
from kt_core.quant import BUILT_IN_FORMATS

QUESTIONS = {
    "Tell me the capital of France.": "Paris",
    "What is the opposite of hot?": "cold",
}

pytestmark = [pytest.mark.network, pytest.mark.slow]


@pytest.mark.parametrize("name", [f.descriptor.name for f in BUILT_IN_FORMATS])
def test_simple_questions(name: str, record_property: Callable[[str, object], None]) -> None:
    with kt_core.load("demo", format=name) as engine:
        answers = [
            engine.generate(question, temperature=0, max_new_tokens=24).text.strip()
            for question in QUESTIONS
        ]
    record_property("answer", (name, " | ".join(answer.split("\n")[0] for answer in answers)))
    for word, answer in zip(QUESTIONS.values(), answers, strict=True):
        assert word in answer
