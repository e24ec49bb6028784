"""Which providers are installed, and where they come from: onnxruntime itself, a plugin library, or Windows ML.

A plugin library is registered with ONNX Runtime once per process. ONNX Runtime then lists the plugin's devices, and a
session is given these devices instead of the provider's name. Libraries that the application or onnxruntime itself has
registered are used as they are.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal

from pard_onnx.models.errors import BadProvider

from .table import PLUGIN_ADVICE, PROVIDERS, Provider, first_line, onnxruntime, provider_named

WINDOWS_ML = "windowsml"  # the Python package with Windows ML's catalog of providers
Origin = Literal["built in", "plugin", "Windows ML"]


@dataclass(frozen=True, slots=True)
class ProviderSource:
    """Where an installed provider comes from."""

    origin: Origin
    devices: tuple[Any, ...] = ()  # of a plugin: ONNX Runtime's OrtEpDevice objects


BUILT_IN = ProviderSource("built in")
REPLACE = "flavours overwrite one another, so uninstall the present one, then get it by"


def require_installed(key: str) -> Provider:
    """The provider with this key; BadProvider if it is unknown or not installed."""
    return as_installed(provider_named(key))


def as_installed(provider: Provider) -> Provider:
    """The provider with the memory that it has as it is installed; BadProvider if it is not installed."""
    plugin = bool(provider_source(provider).devices)
    return replace(provider, memory=provider.plugin_memory) if plugin and provider.plugin_memory else provider


def provider_source(provider: Provider) -> ProviderSource:
    """Where the provider comes from; BadProvider, with the way to install it, if it is not installed."""
    ort = onnxruntime(provider)
    if provider.ort in ort.get_available_providers():
        return BUILT_IN
    found = _plugin(provider)
    if found is None:
        raise BadProvider(f"provider {provider.key!r} is not in the installed onnxruntime; {_way_to_install(provider)}")
    if not found.devices:
        raise BadProvider(
            f"provider {provider.key!r} is installed ({found.origin}), but finds no device here; update the device's "
            "driver, or take another provider"
        )
    return found


def _way_to_install(provider: Provider) -> str:
    """How to install the provider where another onnxruntime is installed."""
    if provider.key in PLUGIN_ADVICE:
        return f"a plugin adds it: {PLUGIN_ADVICE[provider.key]}"
    if ": " in provider.install:  # on another system, or by other means
        return provider.install
    return f"{REPLACE} {provider.install}"


def plugin_version(provider: Provider) -> str:
    """The version of the plugin library that is registered for the provider; "" without one."""
    return next((dict(device.ep_metadata).get("version", "") for device in _devices(provider)), "")


def available_providers() -> dict[str, ProviderSource]:
    """All installed providers by key, in the order of `PROVIDERS`."""
    out = {}
    for key, provider in PROVIDERS.items():
        try:
            out[key] = provider_source(provider)
        except BadProvider:
            continue
    return out


def _plugin(provider: Provider) -> ProviderSource | None:
    """The source of a provider that a plugin library brings; None where there is no such library.

    Raises BadProvider if there are libraries and none of them can be loaded.
    """
    ort = onnxruntime(provider)
    if not hasattr(ort, "register_execution_provider_library"):
        return None
    if registered := _devices(provider):
        return ProviderSource("plugin", registered)
    problems = []
    for origin, find_library in _libraries(provider):
        try:
            if library := find_library():
                _register(provider.ort, library)
                return ProviderSource(origin, _devices(provider))
        except Exception as error:  # of a foreign package, of Windows, or of ONNX Runtime: they share no base class
            problems.append(f"{origin}: {first_line(error)}")
    if problems:
        raise BadProvider(
            f"provider {provider.key!r} is installed, but its library cannot be loaded ({'; '.join(problems)}); update "
            "onnxruntime, the provider's package and the device's driver, or take another provider"
        )
    return None


def _devices(provider: Provider) -> tuple[Any, ...]:
    """The provider's devices, as far as its library is registered."""
    ort = onnxruntime(provider)
    if not hasattr(ort, "get_ep_devices"):  # before ONNX Runtime 1.23
        return ()
    return tuple(device for device in ort.get_ep_devices() if device.ep_name == provider.ort)


def _libraries(provider: Provider) -> Iterator[tuple[Origin, Callable[[], str | None]]]:
    """The packages that may bring the provider as a plugin library, and what finds the library."""
    module = provider.plugin
    if module and find_spec(module):
        yield "plugin", lambda: str(import_module(module).get_library_path())
    if sys.platform == "win32" and find_spec(WINDOWS_ML):
        yield "Windows ML", lambda: windows_ml_library(provider.ort)


@cache
def windows_ml_catalog() -> Any:
    """Windows ML's catalog of providers, open until the process ends, since its libraries may be in use until then."""
    return import_module(WINDOWS_ML).EpCatalog()


@cache
def windows_ml_library(name: str) -> str | None:
    """The library of the provider that ONNX Runtime calls `name`, from the catalog of Windows ML; None if the catalog
    has none for this machine. Windows downloads it if it is missing, and no library of other providers.

    Raises OSError if Windows cannot open the catalog or get the library.
    """
    for entry in windows_ml_catalog().find_all_providers():
        if entry.name.casefold() == name.casefold():
            entry.ensure_ready()
            return entry.library_path or None
    return None


@cache
def _register(name: str, library: str) -> None:
    """Register a plugin library, once per process."""
    onnxruntime().register_execution_provider_library(name, library)
