"""Ollama's API of models: GET /api/tags, /api/ps and /api/version, POST /api/show, and what is not served."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime, timedelta
from importlib.metadata import version as installed_version
from math import inf
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from pard_onnx.models.errors import BadInput
from pard_onnx.models.manifest import FILE_NAME, Manifest
from pard_onnx.models.spec import ModelSpec
from pard_onnx.runtime.asynchronous import in_worker
from pard_onnx.runtime.sampling.generation_config import read_sampling
from pard_onnx.runtime.text.reasoning import thinking_of
from pard_onnx.runtime.text.tool_formats import tool_format
from pard_onnx.serve.errors import bad_field, unsupported
from pard_onnx.serve.fields import Field, Form, read_fields, text
from pard_onnx.serve.registry import OpenModel
from pard_onnx.serve.service import Service
from pard_onnx.serve.sources import Source

from .generation import json_response, rfc3339
from .requests import LATEST, NO_MODEL

EVER = timedelta(days=292 * 365)  # Ollama's longest duration, which its programs show as "Forever"
UNITS = ((1e9, "B", 1), (1e6, "M", 0), (1e3, "K", 0))
SHOW = Form({"model": Field(text), "name": Field(text)}, frozenset(["verbose", "system", "template", "options"]), {})


async def tags(request: Request) -> Response:
    """All models."""
    service = Service.of(request)
    found = await service.registry.sources()
    return json_response({"models": await in_worker(lambda: [listed(service, source) for source in found])})


async def running(request: Request) -> Response:
    """The models that are loaded."""
    service = Service.of(request)
    known = {source.name: source for source in await service.registry.sources()}
    models = [one for one in service.registry.open if one.name in known and not one.leaving]
    return json_response({"models": [loaded(service, known[one.name], one) for one in models]})


async def show(request: Request) -> Response:
    """All that is known of a model."""
    service = Service.of(request)
    own = read_fields(await service.body(request), SHOW, strict=service.settings.strict).own
    name = own.get("model") or own.get("name")
    if not name:
        raise bad_field("model", NO_MODEL)
    source = await service.registry.find(name.removesuffix(LATEST))
    return json_response(await in_worker(lambda: shown_model(service, source)))


async def version(request: Request) -> Response:
    return json_response({"version": installed_version("pard-onnx")})


async def no_management(request: Request) -> Response:
    raise unsupported(
        f"{request.url.path}: the server does not change its models; use the command pard-models (list, pull, rm, show)"
    )


# Descriptions


def manifest_of(service: Service, source: Source) -> Manifest | None:
    """The target's manifest; None for a hub id that is not loaded, and for a damaged folder."""
    if found := next((one for one in service.registry.open if one.name == source.name), None):
        return found.pair.target_manifest
    try:
        return Manifest.read(Path(source.target)) if Path(source.target).is_dir() else None
    except BadInput:
        return None


def named(source: Source) -> dict[str, Any]:
    """Names have a tag, as Ollama's programs expect."""
    name = source.name if ":" in source.name else source.name + LATEST
    return {"name": name, "model": name}


def listed(service: Service, source: Source) -> dict[str, Any]:
    manifest = manifest_of(service, source)
    return {
        **named(source),
        "modified_at": modified(service, source),
        "size": manifest.bytes if manifest else 0,
        "digest": digest(source, manifest),
        "details": details(manifest),
    }


def loaded(service: Service, source: Source, model: OpenModel) -> dict[str, Any]:
    manifest = model.pair.target_manifest
    left = model.seconds_left
    on_cpu = model.pair.choice.provider.key == "cpu"
    return {
        **named(source),
        "size": model.weight_bytes,
        "digest": digest(source, manifest),
        "details": details(manifest),
        "expires_at": rfc3339(datetime.now(UTC) + (EVER if left == inf else timedelta(seconds=left))),
        "size_vram": 0 if on_cpu else model.weight_bytes,
        "context_length": model.pair.capacity,
    }


def shown_model(service: Service, source: Source) -> dict[str, Any]:
    manifest = manifest_of(service, source)
    template = (manifest.spec.chat_template if manifest else None) or ""
    abilities = {
        "completion": True,
        "tools": "tools" in template and tool_format(template) is not None,
        "thinking": thinking_of(template) is not None,
    }
    return {
        "modelfile": f"# Made by pard-serve; models are made by pard-export\nFROM {source.name}\n",
        "parameters": parameters(source, manifest),
        "template": template,  # in Jinja
        "details": details(manifest),
        "model_info": facts(source, manifest) if manifest else {},
        "capabilities": [name for name, able in abilities.items() if able],
        "modified_at": modified(service, source),
    }


def parameters(source: Source, manifest: Manifest | None) -> str:
    """The sampling settings that the model's makers recommend, a line each."""
    folder = Path(source.target)
    try:
        found = read_sampling(folder, manifest.sizes) if manifest and folder.is_dir() else None
    except BadInput:
        found = None
    names = {"temperature": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p",
             "repetition_penalty": "repeat_penalty"}  # fmt: skip
    return "\n".join(f"{name:<30} {getattr(found, own)}" for own, name in names.items()) if found else ""


def modified(service: Service, source: Source) -> str:
    try:
        when = (Path(source.target) / FILE_NAME).stat().st_mtime
    except OSError:
        when = service.started
    return rfc3339(datetime.fromtimestamp(when, UTC))


def digest(source: Source, manifest: Manifest | None) -> str:
    """A SHA-256 of the model's files; of its name where they are not known."""
    parts = [file.sha256 for file in manifest.files] if manifest else [source.name]
    return hashlib.sha256("".join(parts).encode()).hexdigest()


def details(manifest: Manifest | None) -> dict[str, Any]:
    family = manifest.spec.family if manifest else ""
    return {
        "parent_model": "",
        "format": "onnx",
        "family": family,
        "families": [family] if family else [],
        "parameter_size": in_words(parameter_count(manifest.spec)) if manifest else "",
        "quantization_level": manifest.precision.upper() if manifest else "",
    }


def facts(source: Source, manifest: Manifest) -> dict[str, Any]:
    """The keys of GGUF files, which Ollama's clients read."""
    spec, family = manifest.spec, manifest.spec.family
    return {
        "general.architecture": family,
        "general.basename": source.name,
        "general.parameter_count": parameter_count(spec),
        f"{family}.context_length": manifest.capacity,
        f"{family}.embedding_length": spec.hidden,
        f"{family}.block_count": spec.layers,
        f"{family}.feed_forward_length": spec.intermediate,
        f"{family}.attention.head_count": spec.heads,
        f"{family}.attention.head_count_kv": spec.kv_heads,
        f"{family}.attention.key_length": spec.head_dim,
        f"{family}.vocab_size": spec.vocabulary.rows,
        f"{family}.rope.freq_base": spec.rope.theta,
    }


def parameter_count(spec: ModelSpec) -> int:
    """Of the matrices, and of the norms and biases of each layer."""
    queries, keys = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    layer = 2 * spec.hidden * (queries + keys) + 3 * spec.hidden * spec.intermediate
    layer += spec.hidden * len(spec.norms) + (2 * spec.head_dim if spec.qk_norm else 0)
    layer += queries + 2 * keys if spec.qkv_bias else 0
    tables = 1 if spec.tied else 2
    return spec.layers * layer + tables * spec.vocabulary.rows * spec.hidden + spec.hidden


def in_words(count: int) -> str:
    """Such as 7.6B or 494M."""
    for unit, sign, digits in UNITS:
        if count >= unit:
            return f"{count / unit:.{digits}f}{sign}"
    return str(count)
