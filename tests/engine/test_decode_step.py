"""Steps of a fixed shape give what eager steps give, for every family: what a graph would replay."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from transformers import PreTrainedModel

from kt_core.engine.decode_cache import capacity_for, decode_cache, why_no_decode_cache
from kt_core.engine.decode_step import DecodeStep
from kt_core.errors import KtError

NEW = 14  # past the windows and chunks of the tiny models, which are of 8 tokens
# Logits of sums in another order: as in test_families.
TOLERANCE = 2**8 * 2**-24
