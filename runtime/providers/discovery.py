"""Which providers are installed, and where they come from: onnxruntime itself, a plugin library, or Windows ML.

A plugin library is registered with ONNX Runtime once per process. ONNX Runtime then lists the plugin's devices, and a
session is given these devices instead of the provider's name.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal

from pard_onnx.models.errors import BadProvider

from .table import PROVIDERS, Provider, onnxruntime, provider_named

WINDOWS_ML = "windowsml"  # the Python package with Windows ML's catalog of providers
Origin = Literal["built in", "plugin", "Windows ML"]


@dataclass(frozen=True, slots=True)
class ProviderSource:
    """Where an installed provider comes from."""

    origin: Origin
    devices: tuple[Any, ...] = ()  # of a plugin: ONNX Runtime's OrtEpDevice objects


BUILT_IN = ProviderSource("built in")


def require_installed(key: str) -> Provider:
    """The provider with this key; BadProvider if it is unknown or not installed."""
    provider = provider_named(key)
    provider_source(provider)
    return provider


def provider_source(provider: Provider) -> ProviderSource:
    """Where the provider comes from; BadProvider, with the way to install it, if it is not installed."""
    ort = onnxruntime(provider)
    if provider.ort in ort.get_available_providers():
        return BUILT_IN
    found = _plugin(provider)
    if found is None:
        raise BadProvider(
            f"provider {provider.key!r} is not in the installed onnxruntime; flavours overwrite one another, so "
            f"uninstall the present one, then get it by {provider.install}"
        )
    if not found.devices:
        raise BadProvider(
            f"provider {provider.key!r} is installed ({found.origin}), but finds no device here; update the device's "
            "driver, or take another provider"
        )
    return found


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
    """The source of a provider that a plugin library brings; None where there is no such library."""
    ort = onnxruntime(provider)
    if not hasattr(ort, "register_execution_provider_library"):
        return None
    for origin, library in _libraries(provider):
        if _register(provider.ort, library):
            return ProviderSource(
                origin, tuple(device for device in ort.get_ep_devices() if device.ep_name == provider.ort)
            )
    return None


def _libraries(provider: Provider) -> Iterator[tuple[Origin, str]]:
    """The installed plugin libraries that bring the provider."""
    if provider.plugin and find_spec(provider.plugin):
        yield "plugin", import_module(provider.plugin).get_library_path()
    if sys.platform == "win32" and (library := windows_ml_libraries().get(provider.ort)):
        yield "Windows ML", library


@cache
def windows_ml_libraries() -> dict[str, str]:
    """Windows ML's libraries, by ONNX Runtime's name of the provider. Windows downloads the missing ones."""
    if not find_spec(WINDOWS_ML):
        return {}
    found = {}
    with import_module(WINDOWS_ML).EpCatalog() as catalog:
        for entry in catalog.find_all_providers():
            try:
                entry.ensure_ready()
            except Exception:  # a library that Windows cannot download counts as not installed
                continue
            if entry.library_path:
                found[entry.name] = str(entry.library_path)
    return found


@cache
def _register(name: str, library: str) -> bool:
    """Register a plugin library, once per process; False if ONNX Runtime cannot load it."""
    try:
        onnxruntime().register_execution_provider_library(name, library)
    except Exception:  # ONNX Runtime's exceptions share no base class
        return False
    return True
