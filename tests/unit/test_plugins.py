"""Finding plug-ins, running their hooks, and what is said when one of them is wrong.

Longer than most files: the invented plug-ins at its top serve every test.
"""

from __future__ import annotations

import inspect
import re
import sys
import tomllib
from collections.abc import Callable, Sequence
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from kt_core import hookspecs, plugins
from kt_core.errors import BackendUnavailableError, PluginError, UnknownNameError
from kt_core.hookspecs import hookimpl
from kt_core.interfaces import (
    Backend,
    CheckpointFormat,
    ExpertDevice,
    ModelAdapter,
    ModelFiles,
    ModelSource,
    NamedConfig,
    OpenedModel,
    PlacementPolicy,
    QuantizedTensor,
    StoredMatrix,
    WeightFormat,
)
from kt_core.plugins import Registry, Table
from kt_core.types import Capabilities, DeviceInfo, Element, Format

ROOT = Path(__file__).resolve().parents[2]


# ---------------------------------------------------------------- plug-ins to try things with


class FakeBackend(Backend):
    def __init__(
        self,
        name: str,
        *,
        preference: int = 0,
        reason: str | None = None,
        devices: Sequence[str] | None = None,
    ) -> None:
        self.name = name
        self.preference = preference
        self.reason = reason
        self.device_names = [name] if devices is None else devices

    def why_unavailable(self) -> str | None:
        return self.reason

    def devices(self) -> Sequence[DeviceInfo]:
        assert self.reason is None, "asked for the devices of a backend that cannot run"
        return [
            DeviceInfo(name=name, description="", torch_device="cpu", memory_bytes=1)
            for name in self.device_names
        ]

    def capabilities(self, device: str) -> Capabilities:
        raise NotImplementedError

    def open(self, device: str, *, threads: int | None = None) -> ExpertDevice:
        raise NotImplementedError


class FakeFormat(WeightFormat):
    def __init__(self, name: str, *aliases: str) -> None:
        self.descriptor = Format(name=name, element=Element.BF16)
        self.aliases = aliases

    def quantize(self, weight: torch.Tensor) -> QuantizedTensor:
        raise NotImplementedError

    def dequantize(self, quantized: QuantizedTensor) -> torch.Tensor:
        raise NotImplementedError


class FakeAdapter(ModelAdapter):
    def __init__(self, *model_types: str) -> None:
        self.model_types = model_types

    def sites(self, model: Any) -> Any:
        raise NotImplementedError


class FakeSource(ModelSource):
    description = "not a model"

    def __init__(self, name: str) -> None:
        self.name = name

    def resolve(self, cache_dir: Path, progress: Any = None) -> Path:
        raise NotImplementedError


class FakePolicy(PlacementPolicy):
    description = "not a policy"

    def __init__(self, name: str) -> None:
        self.name = name

    def place(self, *arguments: Any) -> Any:
        raise NotImplementedError


def plugin(module_name: str, **hooks: Callable[..., None]) -> ModuleType:
    """A module with these hooks, marked."""
    module = ModuleType(module_name)
    for name, function in hooks.items():
        setattr(module, name, hookimpl(function))
    return module


def backends(module_name: str, *values: Backend) -> ModuleType:
    def kt_register_backends(register: Callable[[Backend], None]) -> None:
        for value in values:
            register(value)

    return plugin(module_name, kt_register_backends=kt_register_backends)


def formats(module_name: str, *values: WeightFormat) -> ModuleType:
    def kt_register_formats(register: Callable[[WeightFormat], None]) -> None:
        for value in values:
            register(value)

    return plugin(module_name, kt_register_formats=kt_register_formats)


def load(*modules: object) -> Registry:
    return plugins.load(*modules, use_entry_points=False)


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """Pretend that these are the installed entry points, and these the texts of their modules."""
    monkeypatch.delenv(plugins.BLOCK_VARIABLE, raising=False)
    monkeypatch.syspath_prepend(tmp_path)

    def pretend(*points: tuple[str, str], **modules: str) -> None:
        for name, source in modules.items():
            (tmp_path / f"{name}.py").write_text(source, encoding="utf-8")
            monkeypatch.delitem(sys.modules, name, raising=False)
        found = EntryPoints(EntryPoint(name, value, "kt") for name, value in points)

        def entry_points(*, group: str) -> EntryPoints:
            assert group == "kt"
            return found

        monkeypatch.setattr("kt_core.plugins.entry_points", entry_points)

    return pretend


GOOD = """
from kt_core.hookspecs import hookimpl
from kt_core.interfaces import WeightFormat
from kt_core.quant import BUILT_IN_FORMATS
@hookimpl
def kt_register_formats(register):
    register(BUILT_IN_FORMATS[0])
"""


# ---------------------------------------------------------------- entry points


def test_entry_points_are_imported_and_registered(install: Callable[..., None]) -> None:
    install(("zeta", "ktt_good"), ktt_good=GOOD)
    registry = plugins.load()
    assert registry.plugins == {"zeta": "ktt_good"}
    assert registry.formats.names() == ("bf16",)
    assert registry.formats.owner("bf16") == "zeta"
    assert registry.blocked == ()


def test_an_entry_point_may_name_an_object(install: Callable[..., None]) -> None:
    source = GOOD.replace("def kt_", "def _kt_").replace("@hookimpl", "") + (
        "class Plugin:\n    kt_register_formats = staticmethod(hookimpl(_kt_register_formats))\n"
    )
    install(("zeta", "ktt_object:Plugin"), ktt_object=source)
    assert plugins.load().formats.names() == ("bf16",)


def test_without_entry_points_nothing_is_there(install: Callable[..., None]) -> None:
    """The core brings nothing of its own: built-in plug-ins come in by the same door."""
    install()
    for registry in (plugins.load(), plugins.load(use_entry_points=False)):
        assert registry.plugins == {}
        assert registry.backends.names() == ()
        assert registry.formats.names() == ()
        assert registry.checkpoint_formats.names() == ()
        assert registry.adapters.names() == ()
        assert registry.generic_adapters == []
        assert registry.model_files.names() == ()
        assert registry.sources.names() == ()
        assert registry.policies.names() == ()


def test_every_package_of_the_wheel_is_installed_by_name() -> None:
    """A built-in plug-in that is not an entry point would be there for nobody."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    declared = project["project"]["entry-points"]["kt"]
    packages = {Path(p).name for p in project["tool"]["scikit-build"]["wheel"]["packages"]}
    assert set(declared.values()) == {
        *packages - {"kt_core", "kt_triton"},  # what plug-ins share is none itself
        "kt_core.placement",
        "kt_core.quant",
    }
    assert packages == {"kt_core"} | {
        path.name
        for top in ("backends", "plugins")
        for path in (ROOT / top).iterdir()
        if not path.name.startswith((".", "_"))
    }
    registry = plugins.load()
    assert declared.items() <= registry.plugins.items()
    assert registry.backends.owner("cpu") == "cpu"
    assert registry.formats.owner("int4") == "formats"
    assert registry.policies.owner("adaptive") == "placement"


def test_two_plugins_of_one_name_are_both_named(install: Callable[..., None]) -> None:
    install(("mine", "ktt_good"), ("mine", "ktt_other"), ktt_good=GOOD, ktt_other=GOOD)
    with pytest.raises(
        PluginError, match=r"'mine' is installed twice: by ktt_good .* ktt_other of"
    ):
        plugins.load()


def test_one_plugin_found_twice_is_one_plugin(install: Callable[..., None]) -> None:
    """As when a path stands twice in sys.path."""
    install(("mine", "ktt_good"), ("mine", "ktt_good"), ktt_good=GOOD)
    assert plugins.load().plugins == {"mine": "ktt_good"}


@pytest.mark.parametrize(
    ("source", "value", "error"),
    [
        ("1 / 0", "ktt_broken", ZeroDivisionError),
        ("import ktt_that_is_not_there", "ktt_broken", ModuleNotFoundError),
        ("def broken(:", "ktt_broken", SyntaxError),
        ("", "ktt_broken:missing", AttributeError),
    ],
)
def test_import_failure_stops_start_up(
    install: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    source: str,
    value: str,
    error: type[Exception],
) -> None:
    install(("good", "ktt_good"), ("bad", value), ktt_good=GOOD, ktt_broken=source)
    with pytest.raises(PluginError) as caught:
        plugins.load()
    message = str(caught.value)
    assert f"plug-in 'bad' ({value}) failed to import: {error.__name__}: " in message
    assert type(caught.value.__cause__) is error

    advice = re.search(r"start without it: (\w+)=(\w+)$", message)
    assert advice is not None
    monkeypatch.setenv(advice[1], advice[2])
    assert plugins.load().plugins == {"good": "ktt_good"}


def test_blocking_keeps_a_plugin_from_being_imported(
    install: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    install(("good", "ktt_good"), ("a", "nowhere.a"), ("b", "nowhere.b"), ktt_good=GOOD)
    monkeypatch.setenv("KT_BLOCK_PLUGINS", " b, ,a,")
    registry = plugins.load()
    assert registry.blocked == ("a", "b")
    assert registry.plugins == {"good": "ktt_good"}


def test_blocking_a_name_that_is_not_there_is_an_error(
    install: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A misspelt name would leave the plug-in in."""
    install(("good", "ktt_good"), ("better", "ktt_good"), ktt_good=GOOD)
    monkeypatch.setenv("KT_BLOCK_PLUGINS", "goood,better")
    with pytest.raises(PluginError) as caught:
        plugins.load()
    assert str(caught.value) == (
        "KT_BLOCK_PLUGINS names ['goood'], which is not installed. Installed: better, good."
    )


# ---------------------------------------------------------------- hooks that do not fit


def test_misspelt_hook_is_an_error() -> None:
    module = plugin("ktt", kt_register_backend=lambda register: None)
    with pytest.raises(PluginError, match=r"plug-in 'ktt' does not fit: .*kt_register_backend"):
        load(module)


def test_misspelt_argument_is_an_error() -> None:
    module = plugin("ktt", kt_register_backends=lambda registrar: None)
    with pytest.raises(PluginError, match=r"plug-in 'ktt' does not fit: .*registrar") as caught:
        load(module)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["kt_register_backends", "kt_register_backend"])
def test_hook_without_its_mark_is_an_error(name: str) -> None:
    """Pluggy passes over it in silence."""
    module = formats("ktt", FakeFormat("f"))
    setattr(module, name, lambda register: None)
    with pytest.raises(PluginError, match=f"'ktt' does not fit: {name} is not marked. Mark each"):
        load(module)


def test_plugin_without_hooks_is_an_error() -> None:
    with pytest.raises(PluginError, match="plug-in 'ktt' does not fit: it has no hook"):
        load(ModuleType("ktt"))


def test_hook_that_fails_names_its_plugin_and_chains_the_cause() -> None:
    def kt_register_backends(register: Callable[[Any], None]) -> None:
        register("a word, not a backend")

    with pytest.raises(PluginError) as caught:
        load(plugin("ktt", kt_register_backends=kt_register_backends))
    assert str(caught.value).startswith(
        "plug-in 'ktt' failed in kt_register_backends: AttributeError: "
    )
    assert "KT_BLOCK_PLUGINS=ktt" in str(caught.value)
    assert type(caught.value.__cause__) is AttributeError


def test_one_plugin_twice_is_an_error() -> None:
    module = formats("ktt", FakeFormat("f"))
    with pytest.raises(PluginError, match=r"plug-in 'ktt' does not fit: .*already registered"):
        load(module, module)


# ---------------------------------------------------------------- what hooks register


def test_hook_kt_register_backends() -> None:
    backend = FakeBackend("toy")
    registry = load(backends("ktt", backend))
    assert registry.backends.get("toy") is backend
    assert list(registry.backends) == [backend]
    assert registry.plugins == {"ktt": "ktt"}


def test_hook_kt_register_formats_and_its_aliases() -> None:
    first, second = FakeFormat("wide", "w", "w16"), FakeFormat("narrow")
    registry = load(formats("ktt", first, second))
    assert registry.formats.names() == ("wide", "w", "w16", "narrow")
    for name in ("wide", "w", "w16"):
        assert registry.formats.get(name) is first
    assert list(registry.formats) == [first, second]


class FakeReader(CheckpointFormat):
    def __init__(self, name: str, *aliases: str) -> None:
        self.name = name
        self.aliases = aliases

    def matrices(self, config: object, tensors: object, read: object) -> list[StoredMatrix]:
        raise NotImplementedError


def test_hook_kt_register_checkpoint_formats_and_their_aliases() -> None:
    reader = FakeReader("tiny", "smaller")

    def kt_register_checkpoint_formats(register: Callable[[CheckpointFormat], None]) -> None:
        register(reader)

    hooks = {"kt_register_checkpoint_formats": kt_register_checkpoint_formats}
    registry = load(plugin("ktt", **hooks))
    assert registry.checkpoint_formats.names() == ("tiny", "smaller")
    assert registry.checkpoint_formats.get("smaller") is reader


def test_hook_kt_register_model_adapters() -> None:
    special, generic = FakeAdapter("alpha", "beta"), FakeAdapter()

    def kt_register_model_adapters(register: Callable[[ModelAdapter], None]) -> None:
        register(special)
        register(generic)

    registry = load(plugin("ktt", kt_register_model_adapters=kt_register_model_adapters))
    assert registry.adapters.get("alpha") is registry.adapters.get("beta") is special
    assert registry.adapters.names() == ("alpha", "beta")
    assert registry.generic_adapters == [generic]


class FakeFiles(ModelFiles):
    name = "tiny"

    def recognises(self, path: Path) -> bool:
        return path.suffix == ".tiny"

    def config(self, path: Path) -> dict[str, object]:
        raise NotImplementedError

    def open(self, path: Path) -> OpenedModel:
        raise NotImplementedError


def test_hook_kt_register_model_files() -> None:
    files = FakeFiles()

    def kt_register_model_files(register: Callable[[ModelFiles], None]) -> None:
        register(files)

    registry = load(plugin("ktt", kt_register_model_files=kt_register_model_files))
    assert list(registry.model_files) == [files]
    assert registry.model_files.get("tiny") is files


def test_hook_kt_register_model_sources() -> None:
    source = FakeSource("tiny")

    def kt_register_model_sources(register: Callable[[ModelSource], None]) -> None:
        register(source)

    registry = load(plugin("ktt", kt_register_model_sources=kt_register_model_sources))
    assert registry.sources.get("tiny") is source
    assert "tiny" in registry.sources
    assert "huge" not in registry.sources


def test_hook_kt_register_placement_policies() -> None:
    policy = FakePolicy("nearest")

    def kt_register_placement_policies(register: Callable[[PlacementPolicy], None]) -> None:
        register(policy)

    registry = load(plugin("ktt", kt_register_placement_policies=kt_register_placement_policies))
    assert registry.policies.get("nearest") is policy
    assert registry.policies.names() == ("nearest",)


def test_hook_kt_register_model_configs(tmp_path: Path) -> None:
    config = NamedConfig(name="tiny", description="a config", file=tmp_path / "config.json")

    def kt_register_model_configs(register: Callable[[NamedConfig], None]) -> None:
        register(config)

    registry = load(plugin("ktt", kt_register_model_configs=kt_register_model_configs))
    assert registry.configs.get("tiny") is config
    assert "tiny" not in registry.sources


def test_hook_kt_register_commands() -> None:
    """Not run by load: only a command line has an application to add to."""

    def kt_register_commands(app: typer.Typer) -> None:
        @app.command()
        def hello(name: str) -> None:
            typer.echo(f"hello {name}")

    app = typer.Typer()
    app.callback()(lambda: None)
    registry = load(plugin("ktt", kt_register_commands=kt_register_commands))
    assert app.registered_commands == []
    registry.add_commands(app)
    result = CliRunner().invoke(app, ["hello", "world"])
    assert (result.exit_code, result.stdout) == (0, "hello world\n")


def test_a_plugin_object_needs_no_module() -> None:
    class Toy:
        @hookimpl
        def kt_register_backends(self, register: Callable[[Backend], None]) -> None:
            register(FakeBackend("toy"))

    registry = load(Toy())
    assert registry.plugins == {"Toy": "Toy"}
    assert registry.backends.owner("toy") == "Toy"


def test_a_name_registered_twice_names_both_owners() -> None:
    cases: list[tuple[str, ModuleType, ModuleType]] = [
        (
            "backend 'toy'",
            backends("first", FakeBackend("toy")),
            backends("second", FakeBackend("toy")),
        ),
        (
            "format 'f'",
            formats("first", FakeFormat("f")),
            formats("second", FakeFormat("other", "f")),
        ),
        (
            "model adapter for 'm'",
            plugin("first", kt_register_model_adapters=lambda register: register(FakeAdapter("m"))),
            plugin(
                "second", kt_register_model_adapters=lambda register: register(FakeAdapter("m"))
            ),
        ),
        (
            "model 's'",
            plugin("first", kt_register_model_sources=lambda register: register(FakeSource("s"))),
            plugin("second", kt_register_model_sources=lambda register: register(FakeSource("s"))),
        ),
        (
            "placement policy 'p'",
            *(
                plugin(
                    name, kt_register_placement_policies=lambda register: register(FakePolicy("p"))
                )
                for name in ("first", "second")
            ),
        ),
    ]
    for what, first, second in cases:
        with pytest.raises(
            PluginError, match=f"{what} is registered twice: by first and by second"
        ):
            load(first, second)
        with pytest.raises(
            PluginError, match=f"{what} is registered twice: by second and by first"
        ):
            load(second, first)


def test_each_name_belongs_to_the_plugin_that_registered_it() -> None:
    """Hooks are run plug-in by plug-in, each once: else a second one would repeat the first."""
    registry = load(
        backends("first", FakeBackend("a")),
        formats("second", FakeFormat("f", "g")),
        backends("third", FakeBackend("b"), FakeBackend("c")),
    )
    assert registry.backends.names() == ("a", "b", "c")
    assert [registry.backends.owner(name) for name in "abc"] == ["first", "third", "third"]
    assert [registry.formats.owner(name) for name in "fg"] == ["second", "second"]


def test_registries_share_nothing() -> None:
    module = backends("ktt", FakeBackend("toy"))
    first, second = load(module), load()
    assert "toy" in first.backends
    assert "toy" not in second.backends
    assert load(module).backends.names() == ("toy",)


# ---------------------------------------------------------------- tables


def test_table_messages() -> None:
    table: Table[int] = Table("colour")
    with pytest.raises(UnknownNameError) as caught:
        table.get("red")
    assert str(caught.value) == "colour 'red' is not registered. Registered: none."
    table.add("red", 1, "paint")
    table.add("blue", 2, "ink")
    with pytest.raises(UnknownNameError) as caught:
        table.get("green")
    assert str(caught.value) == "colour 'green' is not registered. Registered: blue, red."
    with pytest.raises(PluginError) as twice:
        table.add("red", 3, "ink")
    assert str(twice.value) == (
        "colour 'red' is registered twice: by paint and by ink. "
        "Uninstall one of them, or block one with KT_BLOCK_PLUGINS=NAME."
    )
    assert table.get("red") == 1
    assert (table.names(), table.owner("red"), list(table)) == (("red", "blue"), "paint", [1, 2])


# ---------------------------------------------------------------- devices


def find(name: str, *values: Backend) -> tuple[str, str]:
    backend, device = load(backends("ktt", *values)).find_device(name)
    return backend.name, device.name


CPU = FakeBackend("cpu")
GPU = FakeBackend("cuda", preference=10, devices=["cuda:0", "cuda:1"])
BROKEN = FakeBackend("xpu", preference=20, reason="no readable /dev/dri/renderD*")
TOY = FakeBackend("toy", preference=-1)


def test_auto_takes_the_best_that_can_run() -> None:
    assert find("auto", TOY, CPU, GPU, BROKEN) == ("cuda", "cuda:0")
    assert find("auto", TOY, CPU, BROKEN) == ("cpu", "cpu")
    with pytest.raises(BackendUnavailableError):  # nobody wants a toy who did not ask for it
        find("auto", BROKEN, TOY)
    # equal preference: who registered first; a backend without a device is passed over
    other = FakeBackend("other")
    assert find("auto", other, CPU) == ("other", "other")
    assert find("auto", FakeBackend("npu", preference=9, devices=[]), CPU) == ("cpu", "cpu")


def test_device_by_name() -> None:
    for name, backend in {"cpu": "cpu", "cuda:0": "cuda", "cuda:1": "cuda", "toy": "toy"}.items():
        assert find(name, TOY, CPU, GPU, BROKEN) == (backend, name)


@pytest.mark.parametrize("name", ["cuda:2", "cuda", "CPU", ""])
def test_device_that_is_not_here_lists_those_that_are(name: str) -> None:
    with pytest.raises(UnknownNameError) as caught:
        find(name, TOY, CPU, GPU, BROKEN)
    assert str(caught.value) == (f"device {name!r} is not here. Devices: cuda:0, cuda:1, cpu, toy.")


@pytest.mark.parametrize("name", ["xpu", "xpu:0"])
def test_device_of_a_backend_that_cannot_run_says_why(name: str) -> None:
    with pytest.raises(BackendUnavailableError) as caught:
        find(name, CPU, BROKEN)
    assert str(caught.value) == "backend 'xpu' cannot run here: no readable /dev/dri/renderD*"


def test_auto_where_nothing_can_run_gives_every_reason() -> None:
    other = FakeBackend("npu", reason="no driver")
    with pytest.raises(BackendUnavailableError) as caught:
        find("auto", other, BROKEN)
    assert str(caught.value) == (
        "no backend can run here (xpu: no readable /dev/dri/renderD*; npu: no driver). "
        "Run `kt doctor`."
    )
    with pytest.raises(BackendUnavailableError, match=r"\(none is installed\)"):
        load().find_device("auto")
    with pytest.raises(UnknownNameError, match=r"'cpu' is not here. Devices: none\."):
        load().find_device("cpu")


# ---------------------------------------------------------------- every hook: documented, tested

HOOKS = [name for name in vars(hookspecs) if name.startswith("kt_")]


def test_hooks_are_found() -> None:
    """Else the tests below would check nothing."""
    assert len(HOOKS) >= 5
    assert all(inspect.isfunction(getattr(hookspecs, name)) for name in HOOKS)
    specified = {name for name in HOOKS if hasattr(getattr(hookspecs, name), "kt_spec")}
    assert specified == set(HOOKS), "a hook is not marked with @hookspec"


@pytest.mark.parametrize("hook", HOOKS)
def test_every_hook_says_what_it_is_for(hook: str) -> None:
    text = inspect.getdoc(getattr(hookspecs, hook)) or ""
    assert text.partition("\n")[0].endswith("."), f"{hook} needs a first line that is a sentence"


@pytest.mark.parametrize("hook", HOOKS)
def test_every_hook_is_in_the_documentation(hook: str) -> None:
    page = ROOT / "docs" / "plugins.md"
    assert page.is_file(), f"{page} is missing"
    assert re.search(rf"\b{hook}\b", page.read_text(encoding="utf-8")), f"{page} lacks {hook}"


@pytest.mark.parametrize("hook", HOOKS)
def test_every_hook_has_a_test(hook: str) -> None:
    """A test whose name says so: that is what makes somebody write one."""
    pattern = re.compile(rf"^(?:async )?def test_\w*{hook}", re.MULTILINE)
    files = (ROOT / "tests").rglob("test_*.py")
    assert any(pattern.search(file.read_text(encoding="utf-8")) for file in files), (
        f"no test is called test_...{hook}...: write one in tests/unit/test_plugins.py"
    )


@pytest.mark.parametrize("hook", HOOKS)
def test_every_hook_is_run(hook: str) -> None:
    """A specification that nobody calls would be a promise nobody keeps."""
    text = inspect.getsource(plugins)
    assert re.search(rf"\b{hook}\b", text)
