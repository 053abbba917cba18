"""What config.json says of a packed model directory: docs/packed-format.md, section 2."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kt_core.errors import CheckpointError, UnsupportedFormatError
from kt_core.packed import ExpertLayout, LinearLayout
from kt_core.types import (
    SILU,
    Activation,
    ActivationKind,
    Element,
    Format,
    LinearSpec,
    MoeSpec,
    ScaleType,
)

METHOD = "kt"
"""``quant_method`` in the ``quantization_config`` of config.json."""
VERSION = 2
"""Of the format. A reader takes its own and older ones; 2 is where dense layers are packed, too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedLayer:
    """The packed experts of one experts module.

    Attributes:
        name: Dotted path of the module's parameters in the model.
        file: Name of the file in the directory.
        weight_format: How they are stored.
        num_experts: Experts of the module.
        hidden_size: Of the module.
        intermediate_size: Of the module.
        is_gated: Whether experts have a gate projection.
        has_bias: Whether projections have biases.
    """

    name: str
    file: str
    weight_format: Format
    num_experts: int
    hidden_size: int
    intermediate_size: int
    is_gated: bool
    has_bias: bool

    @classmethod
    def of(cls, name: str, file: str, spec: MoeSpec, weight_format: Format) -> PackedLayer:
        """Describe the experts of a layer."""
        return cls(
            name=name,
            file=file,
            weight_format=weight_format,
            num_experts=spec.num_experts,
            hidden_size=spec.hidden_size,
            intermediate_size=spec.intermediate_size,
            is_gated=spec.activation.is_gated,
            has_bias=spec.has_bias,
        )

    @property
    def bytes_per_expert(self) -> int:
        """Bytes of one packed expert."""
        activation = SILU if self.is_gated else _UNGATED
        spec = MoeSpec(
            num_experts=self.num_experts,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            activation=activation,
            has_bias=self.has_bias,
        )
        return ExpertLayout.of(spec, self.weight_format).size_bytes

    @property
    def size_bytes(self) -> int:
        """Bytes of all experts."""
        return self.num_experts * self.bytes_per_expert

    @property
    def packed_name(self) -> str:
        """Tensor with the packed experts, ``[experts, bytes]`` U8."""
        return f"{self.name}.packed"

    @property
    def digests_name(self) -> str:
        """Tensor with the SHA-256 of each expert, ``[experts, 32]`` U8."""
        return f"{self.name}.sha256"

    def describes(self, spec: MoeSpec) -> bool:
        """Whether these are experts of such a layer."""
        return self == PackedLayer.of(self.name, self.file, spec, self.weight_format)


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedDense:
    """A packed dense layer.

    Attributes:
        name: Dotted path of the layer in the model.
        file: Name of the file in the directory.
        weight_format: How it is stored.
        spec: Its shape.
    """

    name: str
    file: str
    weight_format: Format
    spec: LinearSpec

    @property
    def size_bytes(self) -> int:
        """Bytes of the packed layer."""
        return LinearLayout.of(self.spec, self.weight_format).size_bytes

    @property
    def packed_name(self) -> str:
        """Tensor with the packed layer, ``[bytes]`` U8."""
        return f"{self.name}.packed"


_UNGATED = Activation(kind=ActivationKind.RELU, is_gated=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedConfig:
    """The ``quantization_config`` of a packed model directory.

    Attributes:
        layers: By the path of the experts module's parameters.
        source: Where it comes from: for people.
        method: How the experts were quantised: for people.
        dense: By the path of the layer; those that are not here are tensors as ever.
    """

    layers: Mapping[str, PackedLayer]
    source: str = ""
    method: str = ""
    dense: Mapping[str, PackedDense] = field(default_factory=dict)

    @property
    def dense_formats(self) -> frozenset[Format]:
        """Formats of the packed dense layers."""
        return frozenset(layer.weight_format for layer in self.dense.values())

    def saved_dense_bytes(self, element_bytes: int) -> int:
        """Bytes by which packing its dense layers made the model smaller.

        Args:
            element_bytes: Of an element of a layer that is not packed.
        """
        specs = [layer.spec for layer in self.dense.values()]
        numbers = sum(spec.out_features * (spec.in_features + spec.has_bias) for spec in specs)
        return numbers * element_bytes - sum(layer.size_bytes for layer in self.dense.values())

    @property
    def version(self) -> int:
        """The lowest version whose readers understand it."""
        return 2 if self.dense else 1

    def to_dict(self) -> dict[str, Any]:
        """Return what config.json holds."""
        everything: list[PackedLayer | PackedDense] = [*self.layers.values(), *self.dense.values()]
        formats = {layer.weight_format.name: layer.weight_format for layer in everything}
        stored = {
            "quant_method": METHOD,
            "version": self.version,
            "source": self.source,
            "method": self.method,
            "formats": {name: _format_to_dict(form) for name, form in sorted(formats.items())},
            "experts": {
                name: {
                    "format": layer.weight_format.name,
                    "file": layer.file,
                    "num_experts": layer.num_experts,
                    "hidden_size": layer.hidden_size,
                    "intermediate_size": layer.intermediate_size,
                    "is_gated": layer.is_gated,
                    "has_bias": layer.has_bias,
                }
                for name, layer in self.layers.items()
            },
        }
        if self.dense:
            stored["dense"] = {
                name: {
                    "format": layer.weight_format.name,
                    "file": layer.file,
                    "in_features": layer.spec.in_features,
                    "out_features": layer.spec.out_features,
                    "has_bias": layer.spec.has_bias,
                }
                for name, layer in self.dense.items()
            }
        return stored

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any], where: str) -> PackedConfig:
        """Read what config.json holds; ``where`` is named in errors.

        Raises:
            UnsupportedFormatError: It was written by a newer kt.
            CheckpointError: It is damaged.
        """
        version = stored.get("version")
        if isinstance(version, int) and version > VERSION:
            msg = (
                f"{where} is of version {version} of kt's packed format, this kt reads up to "
                f"version {VERSION}. Update kt, or pack the original model again with this one."
            )
            raise UnsupportedFormatError(msg)
        try:
            if not isinstance(version, int) or version < 1:
                msg = f"its version is {version!r}"
                raise ValueError(msg)  # noqa: TRY301 - one message for whatever is wrong
            formats = {n: _format_from_dict(n, f) for n, f in dict(stored["formats"]).items()}
            layers = {
                str(name): _layer_from_dict(str(name), entry, formats)
                for name, entry in dict(stored["experts"]).items()
            }
            dense = {
                str(name): _dense_from_dict(str(name), entry, formats)
                for name, entry in dict(stored.get("dense", {})).items()
            }
            return cls(
                layers=layers,
                source=str(stored.get("source", "")),
                method=str(stored.get("method", "")),
                dense=dense,
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            reason = f"{type(error).__name__}: {error}"
            msg = (
                f"the quantization_config in {where} is damaged ({reason}). Copy the packed model "
                "again, or make it again with `kt quant`."
            )
            raise CheckpointError(msg) from error


def _format_to_dict(weight_format: Format) -> dict[str, Any]:
    return {
        "element": weight_format.element.value,
        "scale": None if weight_format.scale is None else weight_format.scale.value,
        "group_size": weight_format.group_size,
        "has_zero_point": weight_format.has_zero_point,
        "has_minimum": weight_format.has_minimum,
    }


def _format_from_dict(name: str, entry: Mapping[str, Any]) -> Format:
    scale, group_size = entry["scale"], entry["group_size"]
    return Format(
        name=name,
        element=Element(entry["element"]),
        scale=None if scale is None else ScaleType(scale),
        group_size=None if group_size is None else _count(group_size),
        has_zero_point=_flag(entry["has_zero_point"]),
        has_minimum=_flag(entry["has_minimum"]),
    )


def _layer_from_dict(
    name: str, entry: Mapping[str, Any], formats: Mapping[str, Format]
) -> PackedLayer:
    return PackedLayer(
        name=name,
        file=_file_name(entry["file"]),
        weight_format=formats[entry["format"]],
        num_experts=_count(entry["num_experts"]),
        hidden_size=_count(entry["hidden_size"]),
        intermediate_size=_count(entry["intermediate_size"]),
        is_gated=_flag(entry["is_gated"]),
        has_bias=_flag(entry["has_bias"]),
    )


def _dense_from_dict(
    name: str, entry: Mapping[str, Any], formats: Mapping[str, Format]
) -> PackedDense:
    return PackedDense(
        name=name,
        file=_file_name(entry["file"]),
        weight_format=formats[entry["format"]],
        spec=LinearSpec(
            in_features=_count(entry["in_features"]),
            out_features=_count(entry["out_features"]),
            has_bias=_flag(entry["has_bias"]),
        ),
    )


def _file_name(value: Any) -> str:
    file = str(value)
    if "/" in file or file.startswith("."):
        msg = f"{file!r} is no name of a file in the directory"
        raise ValueError(msg)
    return file


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        msg = f"{value!r} is no positive number"
        raise ValueError(msg)
    return value


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        msg = f"{value!r} is neither true nor false"
        raise TypeError(msg)
    return value
