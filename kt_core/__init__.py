"""kt: run Mixture-of-Experts language models that do not fit on the accelerator.

``kt_core.load`` is the front door; everything else is imported from its own module.
"""

from __future__ import annotations

from importlib.metadata import version as _version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kt_core.engine import Engine, load

__all__ = ["Engine", "__version__", "load"]

__version__ = _version("kt-core")


def __getattr__(name: str) -> Any:
    """Import the engine (torch and transformers: seconds) only when it is asked for."""
    if name in ("Engine", "load"):
        import kt_core.engine

        return getattr(kt_core.engine, name)
    msg = f"module 'kt_core' has no attribute {name!r}"
    raise AttributeError(msg)
