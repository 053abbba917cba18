"""Kimi-K2 (text only): the DeepSeek-V3 architecture under a name that transformers lacks.

Source: config.json of moonshotai/Kimi-K2-Instruct names ``DeepseekV3ForCausalLM`` as its
architecture and DeepSeek-V3's keys; transformers 5.23 maps ``kimi_k2`` only inside ``kimi_k25``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import DeepseekV3Config, PreTrainedConfig

from kt_core.interfaces import ModelAdapter


class Adapter(ModelAdapter):
    """Reads the config as DeepSeek-V3's; the rest is generic."""

    model_types = ("kimi_k2",)

    def config(self, config_dict: Mapping[str, Any]) -> PreTrainedConfig:
        """Return the same facts under the name that transformers knows."""
        facts = {key: value for key, value in config_dict.items() if key != "auto_map"}
        return DeepseekV3Config.from_dict(
            {**facts, "model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"]}
        )
