"""What a plug-in writes: one abstract class per kind of plug-in, and the values they exchange."""

from __future__ import annotations

from kt_core.interfaces.backend import Backend, ExpertDevice
from kt_core.interfaces.checkpoint_format import (
    CheckpointFormat,
    Decode,
    ReadTensor,
    StoredMatrix,
    TensorInfo,
)
from kt_core.interfaces.expert_kernel import (
    ExpertGradients,
    ExpertKernel,
    ExpertWeights,
    LoraWeights,
    Ticket,
)
from kt_core.interfaces.host_functions import HostFunctions
from kt_core.interfaces.linear_kernel import LinearKernel
from kt_core.interfaces.model_adapter import ExpertsSite, ModelAdapter
from kt_core.interfaces.model_files import ModelFiles, OpenedModel
from kt_core.interfaces.model_source import ModelSource, Progress, no_progress
from kt_core.interfaces.named_config import NamedConfig
from kt_core.interfaces.placement_policy import (
    ExpertGrid,
    ExpertId,
    OnlinePlacement,
    Placement,
    PlacementPolicy,
    RoutingStatistics,
    Swap,
)
from kt_core.interfaces.weight_format import QuantizedTensor, WeightFormat, stored_parts

__all__ = [
    "Backend",
    "CheckpointFormat",
    "Decode",
    "ExpertDevice",
    "ExpertGradients",
    "ExpertGrid",
    "ExpertId",
    "ExpertKernel",
    "ExpertWeights",
    "ExpertsSite",
    "HostFunctions",
    "LinearKernel",
    "LoraWeights",
    "ModelAdapter",
    "ModelFiles",
    "ModelSource",
    "NamedConfig",
    "OnlinePlacement",
    "OpenedModel",
    "Placement",
    "PlacementPolicy",
    "Progress",
    "QuantizedTensor",
    "ReadTensor",
    "RoutingStatistics",
    "StoredMatrix",
    "Swap",
    "TensorInfo",
    "Ticket",
    "WeightFormat",
    "no_progress",
    "stored_parts",
]
