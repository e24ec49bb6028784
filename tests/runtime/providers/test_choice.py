"""Which provider is taken: named ones, auto, fallbacks, one for the draft; and how sessions are opened there."""

import re
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pard_onnx import BadArtifact, BadInput, BadProvider, PardWarning, load
from pard_onnx.models.manifest import File, Manifest
from pard_onnx.runtime.providers import discovery as installed
from pard_onnx.runtime.providers import opening as compiled
from pard_onnx.runtime.providers.opening import create_session, session_options
from pard_onnx.runtime.providers.table import AUTO_ORDER, HOST, PROVIDERS, parse_options, provider_named, with_options
from pard_onnx.runtime.providers.threads import Threads
from pard_onnx.runtime.sessions.dynamic_shapes import FusedTarget
from pard_onnx.runtime.tuning import remembered as machine
from pard_onnx.runtime.tuning import self_check

TEXT = "the quick brown"
OWN = {"npu": {"cache_dir", "cache_key"}, "migraphx": {"migraphx_model_cache_dir"}}  # options that it is given anyway
OWN_OF_PLUGINS = {"migraphx": {"cache_dir"}, "amdgpu": {"cache_dir"}}
CUDA, WEBGPU, DIRECTML, NPU, MIGRAPHX = (
    PROVIDERS[key].ort for key in ("cuda", "webgpu", "directml", "npu", "migraphx")
)
Device = Callable[..., Any]


def stats(pair: Any) -> Any:
    with pair:
        return pair.generate(TEXT, max_new_tokens=4).stats


def test_a_provider_that_is_here_runs_both_models(pair_folders: tuple[Path, Path], device: Device) -> None:
    device(CUDA)
    found = stats(load(*pair_folders, provider="cuda"))
    assert (found.provider, found.draft_provider, found.provider_reason) == ("cuda", "cuda", "as asked for")
    assert found.kernel == "onnxruntime"


def test_target_and_draft_may_run_on_different_ones(pair_folders: tuple[Path, Path], device: Device) -> None:
    fake = device(CUDA, WEBGPU)
    expected = load(*pair_folders).generate(TEXT, max_new_tokens=12, draft_length=5)
    for target, draft in (("cuda", "cpu"), ("cpu", "webgpu"), ("cuda", "webgpu:1")):
        with load(*pair_folders, provider=target, draft_provider=draft) as pair:
            found = pair.generate(TEXT, max_new_tokens=12, draft_length=5)
        assert (found.tokens, found.stats.accepted) == (expected.tokens, expected.stats.accepted)
        assert (found.stats.provider, found.stats.draft_provider) == (target, draft)
    assert ("webgpu", 1) in fake.memories


def test_auto_takes_the_first_in_order_that_is_here(pair_folders: tuple[Path, Path], device: Device) -> None:
    assert set(AUTO_ORDER) == set(PROVIDERS) and AUTO_ORDER[-1] == "cpu"
    device(WEBGPU, CUDA)
    found = stats(load(*pair_folders, provider="auto"))
    assert found.provider == "cuda"
    assert found.provider_reason == "auto: the first in order that is here and computes it right"


def test_auto_says_what_spoke_against_those_before(pair_folders: tuple[Path, Path], device: Device) -> None:
    device(CUDA, DIRECTML, broken={CUDA: "no driver"})
    found = stats(load(*pair_folders, provider="auto"))
    assert (found.provider, found.draft_provider) == ("cpu", "cpu")
    assert "'cuda' cannot start: no driver" in found.provider_reason
    assert "target: its attention is one fused operator, which directml lacks" in found.provider_reason


def test_auto_passes_over_what_is_right_token_by_token_only(
    pair_folders: tuple[Path, Path], device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    device(CUDA)
    monkeypatch.setattr(self_check, "difference", lambda rows, *_: 0.0 if len(rows) == 1 else 1.0)
    monkeypatch.setattr(self_check, "ACROSS", 1e9)
    found = stats(load(pair_folders[0], provider="auto"))
    assert found.provider == "cpu" and "cuda computes steps of several tokens" in found.provider_reason


def test_auto_passes_over_what_is_slower_than_the_cpu_by_far(
    pair_folders: tuple[Path, Path], device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    device(CUDA)
    monkeypatch.setattr(self_check, "SLOW", 0.0)
    found = stats(load(*pair_folders, provider="auto"))
    assert (found.provider, found.draft_provider) == ("cpu", "cpu")
    assert re.search(
        r"; cuda is slow with .*target: a single step takes .* ms, .* ms on the CPU", found.provider_reason
    )
    found = stats(load(*pair_folders, provider="cuda"))
    assert (found.provider, found.draft_provider) == ("cuda", "cuda")


def test_auto_on_the_cpu_alone_is_the_cpu(pair_folders: tuple[Path, Path]) -> None:
    assert stats(load(pair_folders[0], provider="auto", threads=1)).provider == "cpu"


@pytest.mark.parametrize(
    ("here", "problem"),
    [
        ({}, r"'cuda' is not in the installed onnxruntime; .* pip install .*\[cuda\]"),
        ({"broken": {CUDA: "no driver\nat line 5"}}, "'cuda' cannot start: no driver; check its driver"),
        ({"silent": CUDA}, "'cuda' cannot start: ONNX Runtime could not load its libraries"),
    ],
)
def test_a_provider_that_does_not_run_is_refused_unless_a_fallback_is_asked_for(
    pair_folders: tuple[Path, Path], device: Device, here: dict[str, Any], problem: str
) -> None:
    device(*([CUDA] if here else []), **here)
    with pytest.raises(BadProvider, match=problem) as caught:
        load(*pair_folders, provider="cuda")
    assert "\n" not in str(caught.value)
    with pytest.warns(PardWarning, match=r"target: runs on cpu as a fallback; provider 'cuda'") as told:
        found = stats(load(*pair_folders, provider="cuda", fallback=True))
    assert [warning.filename for warning in told] == [__file__]  # once, and where `load` was called
    assert found.provider == found.draft_provider == "cpu"
    assert found.provider_reason.startswith("fallback; provider 'cuda' ")


def test_graphs_that_a_provider_cannot_run_are_refused(pair_folders: tuple[Path, Path], device: Device) -> None:
    device(DIRECTML, PROVIDERS["npu"].ort)
    for key in ("directml", "npu"):
        with pytest.raises(BadArtifact, match=f"fused operator, which {key} lacks .*; export it .* --device {key}"):
            load(*pair_folders, provider=key)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"provider": "cuda", "provider_options": {"devise_id": 0}}, "no option 'devise_id'; did you mean 'device_id'"),
        ({"provider": "cuda", "provider_options": {"device_id": "first"}}, "is a device's number, not 'first'"),
        ({"provider": "cuda", "provider_options": {"use_tf32": None}}, "takes text or a number, not None"),
        ({"provider": "cpu", "provider_options": {"device_id": 0}}, "'cpu' has no option 'device_id'; it takes none"),
        ({"provider": "auto", "provider_options": {"device_id": 0}}, "name it instead of auto"),
        ({"provider": "cuda:one"}, "a device is a number, as in cuda:0"),
        ({"provider": "cpu:1"}, "cpu has no devices to choose from"),
        ({"provider": "gpu:1"}, "unknown provider 'gpu'; did you mean 'webgpu'"),
        ({"draft_provider": "cpu"}, "but no draft; name one, or leave it out"),
        ({"draft_provider_options": {"device_id": 0}}, "but no draft; name one, or leave it out"),
    ],
)
def test_what_cannot_be_is_told(
    pair_folders: tuple[Path, Path], device: Device, options: dict[str, Any], problem: str
) -> None:
    device(CUDA)
    with pytest.raises(BadInput, match=problem):
        load(pair_folders[0], **options)


def test_options_of_a_command_line() -> None:
    assert parse_options(["a=b=c", "d="]) == {"a": "b=c", "d": ""}
    with pytest.raises(BadProvider, match="is written NAME=VALUE, not 'device_id'"):
        parse_options(["device_id"])


def test_options_reach_the_session(pair_folders: tuple[Path, Path], device: Device) -> None:
    fake = device(CUDA)
    load(pair_folders[0], provider="cuda:2", provider_options={"use_tf32": False}).close()
    assert {(name, tuple(given.items())) for name, given, _ in fake.opened} == {
        (CUDA, (("device_id", "2"), ("use_tf32", "0")))
    }
    assert fake.memories == {("cuda", 2)}


@pytest.mark.parametrize("key", [key for key in PROVIDERS if key not in ("cpu", "amdgpu")])  # a plugin only
def test_how_sessions_are_opened_on_absent_hardware(pair_folders: tuple[Path, Path], device: Device, key: str) -> None:
    """Session options, provider options and memory, by the fake; the toy's graph is not judged here."""
    provider = PROVIDERS[key]
    fake = device(provider.ort)
    session = FusedTarget(pair_folders[0], Manifest.read(pair_folders[0]), provider, Threads(1))
    session.step([1, 2], 1)
    assert set().union(*(given for _, given, _ in fake.opened)) == OWN.get(key, set())
    for _, _, options in fake.opened:
        assert options.real.execution_mode == fake.ExecutionMode.ORT_SEQUENTIAL
        assert options.real.enable_mem_pattern is False
    assert fake.memories == ({(provider.memory, 0)} if provider.memory != HOST else set())
    assert bool(fake.in_place) == (provider.memory != "cpu" and "gqa" in provider.in_place)


def test_what_is_known_of_a_provider_is_of_its_options_too(pair_folders: tuple[Path, Path]) -> None:
    manifest = Manifest.read(pair_folders[0])
    chosen = [
        with_options(provider_named("cuda"), options)
        for options in ({}, {"use_tf32": 0}, {"use_tf32": 1}, {"device_id": 1})
    ]
    kinds = ("tuning", "self-check")
    assert (
        len({machine.record_path(manifest, provider, Threads(1), kind) for provider in chosen for kind in kinds}) == 8
    )


def test_what_is_known_of_a_device_is_of_its_driver(
    pair_folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Another driver may compute wrongly. The CPU has none."""
    manifest, version = Manifest.read(pair_folders[0]), tmp_path / "version"
    monkeypatch.setattr(machine, "DRIVERS", (version,))
    found: dict[str, set[object]] = {"cuda": set(), "cpu": set()}
    for text in ("535.1", "550.2"):
        version.write_text(text)
        for key, paths in found.items():
            paths.add(machine.record_path(manifest, provider_named(key), Threads(1), "self-check"))
    assert (len(found["cuda"]), len(found["cpu"])) == (2, 1)


def test_ep_context_options_are_the_sessions(pair_folders: tuple[Path, Path], device: Device) -> None:
    fake = device(PROVIDERS["npu"].ort)
    given = {"ep.context_enable": 1, "cache_key": "k", "config_file": "vaip.json"}
    create_session(
        str(pair_folders[0] / "model.onnx"), with_options(provider_named("npu"), given), session_options(Threads(1))
    )
    ((_, provider_options, options),) = fake.opened
    assert provider_options == {"cache_key": "k", "config_file": "vaip.json"}
    assert options.entries["ep.context_enable"] == "1"


def test_a_compiled_graph_is_kept_by_a_key_of_its_own(
    write_artifact: Callable[..., Path], tmp_path: Path, device: Device
) -> None:
    device(PROVIDERS["npu"].ort)
    one, other = (write_artifact(tmp_path / str(seed), "target", seed=seed) / "model.onnx" for seed in (1, 2))
    config = one.parent / compiled.VITISAI_CONFIG
    config.write_text("{}")
    manifest = Manifest.read(one.parent)
    replace(manifest, files=(*manifest.files, File.of(config))).write(one.parent)
    (other.parent / compiled.VITISAI_CONFIG).write_text("{}")  # the manifest does not list it
    manifests = [Manifest.read(path.parent) for path in (one, other)]
    found, differs = map(compiled.options_for_graph, [provider_named("npu")] * 2, (one, other), manifests)
    assert found["config_file"] == str(one.parent / compiled.VITISAI_CONFIG) and "config_file" not in differs
    assert found["cache_key"] != differs["cache_key"] and len(found["cache_key"]) == 64
    chosen = with_options(provider_named("npu"), {"cache_key": "mine", "config_file": "own.json"})
    wanted = found | {"cache_key": "mine", "config_file": "own.json"}
    assert compiled.options_for_graph(chosen, one, manifests[0]) == wanted


def plugin(monkeypatch: pytest.MonkeyPatch, name: str, **members: Any) -> None:
    """Install a package that brings a provider, and no other such package."""
    monkeypatch.setitem(sys.modules, name, SimpleNamespace(**members))
    monkeypatch.setattr(installed, "find_spec", lambda wanted: wanted if wanted == name else None)


PLUGINS = {key: provider.plugin for key, provider in PROVIDERS.items() if provider.plugin}


@pytest.mark.parametrize("key", PLUGINS)
def test_a_plugin_library_is_registered_once_and_gives_devices(
    pair_folders: tuple[Path, Path], device: Device, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    """Options, devices and memory, by the fake; the toy's graph is not judged here."""
    name, manifest = PROVIDERS[key].ort, Manifest.read(pair_folders[0])
    fake = device(plugins={name: 2})
    plugin(monkeypatch, str(PLUGINS[key]), get_library_path=lambda: "provider.so")
    for title in (key, f"{key}:1"):
        FusedTarget(pair_folders[0], manifest, installed.require_installed(title), Threads(1)).step([1, 2], 1)
    assert fake.registered == {name: "provider.so"}
    chosen = [[one.number for one in options.devices] for _, _, options in fake.opened]
    assert {tuple(numbers) for numbers in chosen} == {(0,), (1,)}
    # The device itself stands for its number, and WebGPU's deviceId is no device's number.
    assert set().union(*(given for _, given, _ in fake.opened)) == OWN_OF_PLUGINS.get(key, set())
    # I/O binding has no name for the memory of AMD's plugins.
    assert {memory for memory, _ in fake.memories} == ({"webgpu"} if key == "webgpu" else set())
    assert installed.available_providers()[key].origin == "plugin"


def test_a_pair_runs_on_a_plugin_and_a_device_that_is_not_there_is_refused(
    pair_folders: tuple[Path, Path], device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    device(plugins={WEBGPU: 2})
    plugin(monkeypatch, "onnxruntime_ep_webgpu", get_library_path=lambda: "webgpu.so")
    assert stats(load(*pair_folders, provider="webgpu:1")).provider == "webgpu:1"
    with pytest.raises(BadProvider, match="'webgpu:2': its last device here is 1"):
        load(*pair_folders, provider="webgpu:2")


def test_a_library_that_the_application_has_registered_is_used_as_it_is(
    pair_folders: tuple[Path, Path], device: Device
) -> None:
    """onnxruntime-gpu may register its CUDA plugin itself."""
    fake = device(plugins={CUDA: 1})
    fake.register_execution_provider_library(CUDA, "own.so")
    assert stats(load(*pair_folders, provider="cuda")).provider == "cuda"
    assert fake.registered == {CUDA: "own.so"}


def test_another_version_of_a_plugin_is_checked_anew(
    pair_folders: tuple[Path, Path], device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows updates the providers of Windows ML by itself."""
    fake = device(plugins={WEBGPU: 1})
    fake.register_execution_provider_library(WEBGPU, "webgpu.so")
    manifest, paths = Manifest.read(pair_folders[0]), set()
    for version in ("0.4.0", "0.5.0"):
        monkeypatch.setattr(fake, "plugin_version", version)
        paths.add(machine.record_path(manifest, provider_named("webgpu"), Threads(1), "self-check"))
    assert len(paths) == 2


def test_a_plugin_that_is_missing_leaves_the_installed_onnxruntime_as_it_is(device: Device) -> None:
    device()
    with pytest.raises(BadProvider, match=r"a plugin adds it: pip install onnxruntime-ep-webgpu$"):
        installed.provider_source(provider_named("webgpu"))


def test_a_plugin_without_a_device_is_told(
    pair_folders: tuple[Path, Path], device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    device(plugins={WEBGPU: 0})
    plugin(monkeypatch, "onnxruntime_ep_webgpu", get_library_path=lambda: "webgpu.so")
    with pytest.raises(BadProvider, match=r"'webgpu' is installed \(plugin\), but finds no device here; update"):
        load(*pair_folders, provider="webgpu")


def no_library() -> str:
    raise RuntimeError("expected one library\nfound none")


@pytest.mark.parametrize(
    ("members", "problem"),
    [
        ({"get_library_path": no_library}, r"\(plugin: expected one library\)"),
        ({"get_library_path": lambda: "webgpu.so"}, r"\(plugin: webgpu.so cannot be loaded\)"),
        ({}, r"\(plugin: .*get_library_path'\)"),
    ],
    ids=["incomplete", "refused by onnxruntime", "of another form"],
)
def test_a_plugin_that_cannot_be_loaded_is_not_called_missing(
    device: Device, monkeypatch: pytest.MonkeyPatch, members: dict[str, Any], problem: str
) -> None:
    device()
    plugin(monkeypatch, "onnxruntime_ep_webgpu", **members)
    with pytest.raises(BadProvider, match=f"'webgpu' is installed, but its library cannot be loaded {problem}; update"):
        installed.provider_source(provider_named("webgpu"))
    assert "webgpu" not in installed.available_providers()


class Catalog:
    """Windows ML's catalog of providers. asked: the names of those that were to be made ready."""

    def __init__(self, *names: str, broken: str | None = None) -> None:
        self.names, self.broken, self.asked = names, broken, list[str]()

    def __call__(self) -> Any:
        if self.broken == "catalog":
            raise OSError("Class not registered")
        return self

    def find_all_providers(self) -> list[Any]:
        return [
            SimpleNamespace(name=name, library_path=f"{name}.dll", ensure_ready=partial(self.ensure_ready, name))
            for name in self.names
        ]

    def ensure_ready(self, name: str) -> None:
        self.asked.append(name)
        if name == self.broken:
            raise OSError("no network")


def windows_ml(monkeypatch: pytest.MonkeyPatch, catalog: Catalog) -> None:
    plugin(monkeypatch, installed.WINDOWS_ML, EpCatalog=catalog)
    monkeypatch.setattr(sys, "platform", "win32")


def test_windows_ml_gets_the_library_of_the_provider_that_is_asked_for_and_no_other(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake, catalog = device(plugins={NPU: 1, MIGRAPHX: 1}), Catalog("QNNExecutionProvider", MIGRAPHX, NPU)
    windows_ml(monkeypatch, catalog)
    assert installed.provider_source(provider_named("npu")).origin == "Windows ML"
    assert (fake.registered, catalog.asked) == ({NPU: f"{NPU}.dll"}, [NPU])
    assert installed.available_providers().keys() == {"cpu", "migraphx", "npu"}
    assert catalog.asked == [NPU, MIGRAPHX]


@pytest.mark.parametrize(("broken", "cause"), [("catalog", "Class not registered"), (NPU, "no network")])
def test_what_windows_ml_says_is_passed_on(
    device: Device, monkeypatch: pytest.MonkeyPatch, broken: str, cause: str
) -> None:
    device(plugins={NPU: 1})
    windows_ml(monkeypatch, Catalog(NPU, broken=broken))
    with pytest.raises(BadProvider, match=rf"library cannot be loaded \(Windows ML: {cause}\); update"):
        installed.provider_source(provider_named("npu"))
    assert installed.available_providers().keys() == {"cpu"}


def test_a_provider_that_windows_ml_has_not_is_missing(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    device()
    windows_ml(monkeypatch, Catalog("QNNExecutionProvider"))
    with pytest.raises(BadProvider, match="'npu' is not in the installed onnxruntime"):
        installed.provider_source(provider_named("npu"))
