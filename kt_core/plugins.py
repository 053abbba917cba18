"""Find the plug-ins, run their hooks once, and answer "who is called that?"."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

import pluggy

from kt_core import hookspecs
from kt_core.errors import BackendUnavailableError, PluginError, UnknownNameError
from kt_core.interfaces import (
    Backend,
    CheckpointFormat,
    ModelAdapter,
    ModelFiles,
    ModelSource,
    NamedConfig,
    PlacementPolicy,
    WeightFormat,
)
from kt_core.types import DeviceInfo

ENTRY_POINT_GROUP = "kt"
BLOCK_VARIABLE = "KT_BLOCK_PLUGINS"

Named = TypeVar("Named")


class Table(Generic[Named]):
    """Names of one kind of thing, each with its owner; iterates in order of registration."""

    def __init__(self, kind: str) -> None:
        """Make an empty table; ``kind`` is the word used in messages."""
        self.kind = kind
        self._entries: dict[str, tuple[Named, str]] = {}

    def add(self, name: str, value: Named, owner: str) -> None:
        """Add a name.

        Raises:
            PluginError: The name is taken; the message names both owners.
        """
        if name in self._entries:
            msg = (
                f"{self.kind} {name!r} is registered twice: by {self._entries[name][1]} and by "
                f"{owner}. Uninstall one of them, or block one with {BLOCK_VARIABLE}=NAME."
            )
            raise PluginError(msg)
        self._entries[name] = (value, owner)

    def get(self, name: str) -> Named:
        """Return what is called ``name``.

        Raises:
            UnknownNameError: Nothing is; the message lists what there is.
        """
        if name not in self._entries:
            known = ", ".join(sorted(self._entries)) or "none"
            msg = f"{self.kind} {name!r} is not registered. Registered: {known}."
            raise UnknownNameError(msg)
        return self._entries[name][0]

    def owner(self, name: str) -> str:
        """Return the plug-in that registered ``name``."""
        return self._entries[name][1]

    def names(self) -> tuple[str, ...]:
        """All names, in order of registration."""
        return tuple(self._entries)

    def __iter__(self) -> Iterator[Named]:
        """Iterate over the distinct values."""
        return iter(dict.fromkeys(value for value, _ in self._entries.values()))

    def __contains__(self, name: object) -> bool:
        """Whether something is called ``name``."""
        return name in self._entries


@dataclass(slots=True)
class Registry:
    """Everything the plug-ins registered. Made once by ``load`` and passed to who needs it.

    Attributes:
        backends: By backend name.
        formats: By format name and alias.
        checkpoint_formats: By ``quant_method``.
        adapters: By ``model_type``.
        generic_adapters: Asked, in order, about a model that no adapter names.
        model_files: By the name of their kind.
        sources: By model name.
        policies: By name of the placement policy.
        configs: Of released models, by name.
        plugins: Import name of each plug-in, by its name.
        blocked: Names that ``KT_BLOCK_PLUGINS`` kept out.
    """

    backends: Table[Backend] = field(default_factory=lambda: Table("backend"))
    formats: Table[WeightFormat] = field(default_factory=lambda: Table("format"))
    checkpoint_formats: Table[CheckpointFormat] = field(
        default_factory=lambda: Table("reader of checkpoints with quant_method")
    )
    adapters: Table[ModelAdapter] = field(default_factory=lambda: Table("model adapter for"))
    generic_adapters: list[ModelAdapter] = field(default_factory=list)
    model_files: Table[ModelFiles] = field(default_factory=lambda: Table("kind of model files"))
    sources: Table[ModelSource] = field(default_factory=lambda: Table("model"))
    policies: Table[PlacementPolicy] = field(default_factory=lambda: Table("placement policy"))
    configs: Table[NamedConfig] = field(default_factory=lambda: Table("config"))
    plugins: dict[str, str] = field(default_factory=dict)
    blocked: tuple[str, ...] = ()
    manager: pluggy.PluginManager = field(
        default_factory=lambda: pluggy.PluginManager(hookspecs.PROJECT)
    )

    def add_commands(self, app: Any) -> None:
        """Let the plug-ins add their commands to the Typer application.

        Raises:
            PluginError: One of them failed; its own error is the cause.
        """
        try:
            self.manager.hook.kt_register_commands(app=app)
        except Exception as error:
            msg = (
                f"a plug-in failed to add its commands: {type(error).__name__}: {error}. "
                f"Find it with `kt plugins`, start without it: {BLOCK_VARIABLE}=NAME"
            )
            raise PluginError(msg) from error

    def find_device(self, name: str) -> tuple[Backend, DeviceInfo]:
        """Return the device called ``name`` (or the best one, for ``auto``) and its backend.

        Toys and references, whose ``preference`` is below 0, are taken by name only.

        Raises:
            UnknownNameError: No backend that can run here has such a device.
            BackendUnavailableError: The name is a backend's that cannot run here, or, for
                ``auto``, none can.
        """
        reasons: dict[str, str] = {}
        found: list[str] = []
        for backend in sorted(self.backends, key=lambda b: -b.preference):
            reason = backend.why_unavailable()
            if reason is not None:
                reasons[backend.name] = reason
                continue
            for device in backend.devices():
                if name == device.name or (name == "auto" and backend.preference >= 0):
                    return backend, device
                found.append(device.name)
        wanted = name.partition(":")[0]
        if wanted in reasons:
            msg = f"backend {wanted!r} cannot run here: {reasons[wanted]}"
            raise BackendUnavailableError(msg)
        if name == "auto":
            detail = "; ".join(f"{key}: {value}" for key, value in reasons.items())
            msg = f"no backend can run here ({detail or 'none is installed'}). Run `kt doctor`."
            raise BackendUnavailableError(msg)
        msg = f"device {name!r} is not here. Devices: {', '.join(found) or 'none'}."
        raise UnknownNameError(msg)


def load(*plugins: object, use_entry_points: bool = True) -> Registry:
    """Import the installed plug-ins, run their hooks and return what they registered.

    Args:
        plugins: Modules or objects to register besides the installed ones.
        use_entry_points: False to take only ``plugins``, as tests do.

    Raises:
        PluginError: A plug-in failed to import or to run (its own error is the cause), implements
            a hook that does not exist or none at all, or took a name that was taken.
    """
    registry = Registry()
    registry.manager.add_hookspecs(hookspecs)
    named: list[tuple[str, object]] = [(_name_of(plugin), plugin) for plugin in plugins]
    if use_entry_points:
        blocked = {n.strip() for n in os.environ.get(BLOCK_VARIABLE, "").split(",") if n.strip()}
        points = _installed()
        registry.blocked = tuple(sorted(blocked))
        if unknown := blocked - set(points):
            msg = (
                f"{BLOCK_VARIABLE} names {sorted(unknown)}, which is not installed. "
                f"Installed: {', '.join(sorted(points))}."
            )
            raise PluginError(msg)
        named += [(n, _import(point)) for n, point in sorted(points.items()) if n not in blocked]
    for name, plugin in named:
        _register(registry, name, plugin)
    return registry


def _installed() -> dict[str, EntryPoint]:
    """The entry points by name. Two of one name would hide each other."""
    points: dict[str, EntryPoint] = {}
    for point in entry_points(group=ENTRY_POINT_GROUP):
        first = points.setdefault(point.name, point)
        if first.value != point.value:
            owners = " and by ".join(
                f"{p.value} of {p.dist.name if p.dist else 'an unnamed distribution'}"
                for p in (first, point)
            )
            msg = f"plug-in {point.name!r} is installed twice: by {owners}. Uninstall one of them."
            raise PluginError(msg)
    return points


def _import(point: EntryPoint) -> object:
    try:
        return point.load()
    except Exception as error:
        msg = (
            f"plug-in {point.name!r} ({point.value}) failed to import: "
            f"{type(error).__name__}: {error}. Fix or uninstall it, or start without it: "
            f"{BLOCK_VARIABLE}={point.name}"
        )
        raise PluginError(msg) from error


def _name_of(plugin: object) -> str:
    return str(getattr(plugin, "__name__", type(plugin).__name__))


def _register(registry: Registry, name: str, plugin: object) -> None:
    manager = registry.manager
    try:
        manager.register(plugin, name)
        manager.check_pending()
    except (pluggy.PluginValidationError, ValueError) as error:
        reason = " ".join(str(error).split())  # pluggy writes several lines
        msg = (
            f"plug-in {name!r} does not fit: {reason}. "
            "The hooks are listed in kt_core.hookspecs and docs/plugins.md."
        )
        raise PluginError(msg) from error
    hooks = {caller.name for caller in manager.get_hookcallers(plugin) or ()}
    unmarked = [n for n in dir(plugin) if n.startswith("kt_register_") and n not in hooks]
    if unmarked or not hooks:
        what = f"{', '.join(unmarked)} is not marked" if unmarked else "it has no hook"
        msg = (
            f"plug-in {name!r} does not fit: {what}. "
            "Mark each hook with @kt_core.hookspecs.hookimpl; docs/plugins.md lists them."
        )
        raise PluginError(msg)
    registry.plugins[name] = _name_of(plugin)
    _run(manager, name, _registrars(registry, name))


def _registrars(registry: Registry, owner: str) -> Mapping[str, Callable[[Any], None]]:
    """One ``register`` function per hook that takes one, which remembers the owner."""

    def add_format(value: WeightFormat) -> None:
        for alias in (value.descriptor.name, *value.aliases):
            registry.formats.add(alias, value, owner)

    def add_checkpoint_format(value: CheckpointFormat) -> None:
        for method in (value.name, *value.aliases):
            registry.checkpoint_formats.add(method, value, owner)

    def add_adapter(value: ModelAdapter) -> None:
        if not value.model_types:
            registry.generic_adapters.append(value)
        for model_type in value.model_types:
            registry.adapters.add(model_type, value, owner)

    return {
        "kt_register_backends": lambda v: registry.backends.add(v.name, v, owner),
        "kt_register_formats": add_format,
        "kt_register_checkpoint_formats": add_checkpoint_format,
        "kt_register_model_adapters": add_adapter,
        "kt_register_model_files": lambda v: registry.model_files.add(v.name, v, owner),
        "kt_register_model_sources": lambda v: registry.sources.add(v.name, v, owner),
        "kt_register_placement_policies": lambda v: registry.policies.add(v.name, v, owner),
        "kt_register_model_configs": lambda v: registry.configs.add(v.name, v, owner),
    }


def _run(
    manager: pluggy.PluginManager, name: str, registrars: Mapping[str, Callable[[Any], None]]
) -> None:
    """Call this plug-in's own hooks only, so that each name has an owner."""
    others = [other for other_name, other in manager.list_name_plugin() if other_name != name]
    for hook, register in registrars.items():
        try:
            manager.subset_hook_caller(hook, remove_plugins=others)(register=register)
        except PluginError:
            raise
        except Exception as error:
            msg = (
                f"plug-in {name!r} failed in {hook}: {type(error).__name__}: {error}. "
                f"Fix or uninstall it, or start without it: {BLOCK_VARIABLE}={name}"
            )
            raise PluginError(msg) from error
