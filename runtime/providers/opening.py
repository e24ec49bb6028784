"""Opens a graph as an ONNX Runtime session on a provider."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from pard_onnx.models.cache_folder import private_folder
from pard_onnx.models.errors import BadArtifact, BadInput, BadProvider
from pard_onnx.models.graph_file import read_graph
from pard_onnx.models.manifest import DATA, VITISAI_CONFIG, Manifest
from pard_onnx.models.precision import NO_PREPACKING
from pard_onnx.models.system_errors import is_out_of_memory, out_of_memory
from pard_onnx.runtime.forks import never_free_in_children
from pard_onnx.runtime.kernels.graph import with_kernel

from .discovery import provider_source
from .fit import require_fit
from .table import CPU, SESSION_OPTION, Provider, first_line, onnxruntime
from .threads import Threads, set_threads

# ONNX Runtime's log severities. Its errors on the CPU are exceptions, whose text it would log a second time; other
# providers log the cause alone, such as a missing library
ERRORS_ONLY, FATAL_ONLY = 3, 4


def open_graph(path: Path, manifest: Manifest, provider: Provider, threads: Threads) -> Any:
    """An onnxruntime.InferenceSession.

    manifest: of the graph's folder. Raises BadArtifact if the graph reads other files than the manifest lists, or has
    other inputs and outputs than the manifest says, or if ONNX Runtime refuses it; Failure without memory.
    """
    options = session_options(threads)
    model = read_graph(path, manifest.sizes)
    try:
        if provider.key == CPU.key:
            options.log_severity_level = FATAL_ONLY
            if manifest.recipe.half_minimums:
                options.add_session_config_entry(*NO_PREPACKING)
            graph = with_kernel(path, options, model)
            session = create_session(graph if isinstance(graph, bytes) else str(graph), provider, options)
        else:
            with_defaults = replace(provider, options=tuple(options_for_graph(provider, path, manifest).items()))
            session = create_session(str(path), with_defaults, options)
    except BadInput:
        raise
    except Exception as error:  # ONNX Runtime's exceptions share no base class
        if is_out_of_memory(error):
            if provider.key == CPU.key:
                raise out_of_memory(error) from error
            raise BadArtifact(
                f"{path.parent.name}: its {manifest.bytes / 2**20:.0f} MiB of weights do not fit the memory of "
                f"{provider.title}; export it in a smaller --precision, or take another provider"
            ) from error
        raise BadArtifact(f"{path} cannot be loaded on {provider.title}: {first_line(error)}") from error
    require_fit(path, session, manifest)
    return session


def session_options(threads: Threads) -> Any:
    """SessionOptions for these threads."""
    options = onnxruntime().SessionOptions()
    options.log_severity_level = ERRORS_ONLY
    options.enable_mem_pattern = False  # a pattern is kept for each shape, and each step has a new mask length
    set_threads(threads, options)
    return options


def create_session(graph: str | bytes, provider: Provider, options: Any) -> Any:
    """The session of a graph (a path, or the model itself).

    Raises BadProvider if ONNX Runtime made the session without the provider: it does so where libraries are missing.
    """
    ort = onnxruntime(provider)
    chosen = {name: value for name, value in provider.options if not name.startswith(SESSION_OPTION)}
    for name, value in provider.options:
        if name not in chosen:
            options.add_session_config_entry(name, value)
    if provider.key == CPU.key:
        session = ort.InferenceSession(graph, options, providers=[provider.ort], enable_fallback=0)
        never_free_in_children(session)
        return session
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL  # DirectML requires it
    found = provider_source(provider)
    if found.devices:
        if provider.device >= len(found.devices):
            raise BadProvider(f"provider {provider.title!r}: its last device here is {len(found.devices) - 1}")
        chosen.pop(provider.device_option, None)  # the device itself replaces this option
        options.add_provider_for_devices([found.devices[provider.device]], chosen)
        session = ort.InferenceSession(graph, options)
    else:
        # ONNX Runtime's fallback to other providers would print to stdout and hide the error.
        session = ort.InferenceSession(graph, options, providers=[(provider.ort, chosen)], enable_fallback=0)
    if provider.ort not in session.get_providers():
        raise cannot_start(provider, "ONNX Runtime could not load its libraries")
    never_free_in_children(session)
    return session


def cannot_start(provider: Provider, reason: str) -> BadProvider:
    """The error for a provider that is installed but does not work."""
    return BadProvider(
        f"provider {provider.title!r} cannot start: {reason}; check its driver and libraries with pard-doctor, or "
        "run on another provider (--fallback goes on on the CPU)"
    )


def vitisai_options(path: Path, manifest: Manifest) -> dict[str, str]:
    """VitisAI's cache of compiled graphs. Its key is a hash of the graph and its weights, so that another export is
    compiled anew."""
    files = [file.sha256 for file in manifest.files if file.name in (path.name, DATA)]
    key = hashlib.sha256("".join(files).encode()).hexdigest()
    folder = private_folder("vitisai")
    out = {"cache_dir": str(folder), "cache_key": key} if folder else {}
    config = path.parent / VITISAI_CONFIG
    return out | ({"config_file": str(config)} if config.name in manifest.sizes else {})


def compile_cache(name: str, option: str) -> Callable[[Path, Manifest], dict[str, str]]:
    """What gives a provider its cache of compiled graphs, whose files it names itself.

    name: of the folder; option: the provider's name for it.
    """

    def options(path: Path, manifest: Manifest) -> dict[str, str]:
        folder = private_folder(name)
        return {option: str(folder)} if folder else {}

    return options


# Options of the providers that compile graphs, made from the graph's path and manifest: by the provider's key, and
# whether it is a plugin, since AMD's plugins have other names for them than the provider that was built in.
DEFAULT_OPTIONS: dict[tuple[str, bool], Callable[[Path, Manifest], dict[str, str]]] = {
    ("npu", False): vitisai_options,
    ("npu", True): vitisai_options,
    ("migraphx", False): compile_cache("migraphx", "migraphx_model_cache_dir"),
    ("migraphx", True): compile_cache("migraphx", "cache_dir"),
    ("amdgpu", True): compile_cache("amdgpu", "cache_dir"),
}


def options_for_graph(provider: Provider, path: Path, manifest: Manifest) -> dict[str, str]:
    """The provider's options for this graph: the defaults, where the user did not choose otherwise."""
    make = DEFAULT_OPTIONS.get((provider.key, bool(provider_source(provider).devices)))
    return (make(path, manifest) if make else {}) | dict(provider.options)
