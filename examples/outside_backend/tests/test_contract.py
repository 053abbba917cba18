"""The whole test suite of a plug-in: kt's contract suites, told what to test."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import Qwen3MoeForCausalLM

from kt_core import plugins
from kt_core.testing import BackendContract, ModelAdapterContract, WeightFormatContract
from kt_outside.backend import FORMATS, SlowpokeBackend
from kt_outside.formats import INT4_ROW
from kt_outside.outside_moe import OutsideMoeAdapter


# --8<-- [start:backend]
class TestSlowpoke(BackendContract):
    backend = SlowpokeBackend()
    formats = FORMATS


# --8<-- [end:backend]


# --8<-- [start:format]
class TestInt4Row(WeightFormatContract):
    weight_formats = (INT4_ROW,)


# --8<-- [end:format]


# --8<-- [start:adapter]
class TestOutsideMoe(ModelAdapterContract):
    adapter = OutsideMoeAdapter()

    def config_dict(self, model_type: str) -> Mapping[str, Any]:
        return {
            "model_type": model_type,
            "n_experts": 8,
            "num_experts_per_tok": 2,
            "expert_size": 24,
            "hidden_size": 32,
            "intermediate_size": 48,
            "head_dim": 8,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "num_hidden_layers": 2,
            "vocab_size": 128,
            "initializer_range": 0.1,
        }

    def make_model(self, model_type: str) -> nn.Module:
        config = self.adapter.config(self.config_dict(model_type))
        torch.manual_seed(0)
        return Qwen3MoeForCausalLM._from_config(config, experts_implementation="eager").eval()


# --8<-- [end:adapter]


def test_kt_finds_the_plugin() -> None:
    registry = plugins.load()
    assert registry.backends.owner("slowpoke") == "outside"
    assert registry.adapters.owner("outside_moe") == "outside"
    assert registry.formats.owner("int4-row") == "outside"
    assert registry.find_device("slowpoke")[0] is registry.backends.get("slowpoke")
    assert registry.find_device("auto")[1].name != "slowpoke"
