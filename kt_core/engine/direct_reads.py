"""Whether a model's code reads the weight of a layer instead of calling the layer.

``self.dt_proj.weight @ x`` cannot work on packed weights, so such layers stay as they are. Told
from the source: an attribute ``weight`` or ``bias`` of an attribute, read anywhere in the module
that defines the layer's owner, initialisation aside. What is only asked for its type or shape
does no harm.
"""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Iterator
from typing import Any

from torch import nn

_PARAMETERS = frozenset({"weight", "bias"})
_HARMLESS = frozenset({"device", "dtype", "is_meta", "ndim", "numel", "shape", "size"})
_INITIALISING = frozenset({"__init__", "_init_weights"})


class DirectReads:
    """Remembers the sources it has read."""

    def __init__(self) -> None:
        """Start with none."""
        self._names: dict[str, frozenset[str]] = {}

    def has(self, owner: object, name: str) -> bool:
        """Whether code of the owner's module reads the parameters of its layer ``name``."""
        classes = [base for base in type(owner).__mro__ if base not in nn.Module.__mro__]
        return any(name in self._names_in(module) for module in {c.__module__ for c in classes})

    def _names_in(self, module: str) -> frozenset[str]:
        if module not in self._names:
            try:
                source = inspect.getsource(sys.modules[module])
            except (KeyError, OSError, TypeError):  # made at run time: see DenseLoader.try_out
                source = ""
            self._names[module] = frozenset(_read_layers(ast.parse(source), None))
        return self._names[module]


def _read_layers(node: ast.AST, parent: Any) -> Iterator[str]:
    if isinstance(node, ast.FunctionDef) and node.name in _INITIALISING:
        return
    if (
        isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Load)
        and node.attr in _PARAMETERS
        and isinstance(node.value, ast.Attribute)
        and getattr(parent, "attr", None) not in _HARMLESS
    ):
        yield node.value.attr
    for child in ast.iter_child_nodes(node):
        yield from _read_layers(child, node)
