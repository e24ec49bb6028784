"""KV caches for providers other than the CPU, in the memory of their device where they have one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pard_onnx.models.errors import BadArtifact
from pard_onnx.models.manifest import KV_MARGIN, Manifest
from pard_onnx.runtime.providers.memory import Buffer, OutOfMemory, make_buffers
from pard_onnx.runtime.providers.table import CPU, HOST, Provider

from .kv_cache import KvCache, KvRows

USABLE_SHARE = 0.9  # of the free memory: steps need memory, too


class CopiedKvCache(KvCache):
    """A cache in the host's memory, for a provider that copies what is bound to it: each step binds the cache anew."""

    def run(self, session: Any, binding: Any) -> None:
        self.bind(binding)
        session.run_with_iobinding(binding)


class DeviceKvCache(KvCache):
    """A cache on the device. It is copied to the host only to be saved, or to be forked.

    Where a graph's past and present must not be one buffer, there are two buffers, which take turns.
    """

    can_be_copied = False  # whole buffers would go through the host: a device computes a prefix in about that time

    def __init__(self, manifest: Manifest, provider: Provider) -> None:
        super().__init__(manifest)
        self._manifest, self._provider = manifest, provider
        blank = [np.zeros(self._shape, self._type)] * len(self._names)
        needed = blank * 2 if takes_turns(manifest, provider) else blank
        try:
            made = make_buffers(provider, needed)
        except OutOfMemory as full:
            raise too_large(manifest, provider, full.made, len(needed)) from full
        self._past: list[Buffer] = made[: len(blank)]
        self._present: list[Buffer] = made[len(blank) :] or self._past

    def bind(self, binding: Any) -> None:
        for name, past, present in zip(self._names, self._past, self._present, strict=True):
            binding.bind_ortvalue_input(f"past_key_values.{name}", past.value)
            binding.bind_ortvalue_output(f"present.{name}", present.value)

    def run(self, session: Any, binding: Any) -> None:
        if self._past is self._present:
            session.run_with_iobinding(binding)
            return
        self.bind(binding)
        session.run_with_iobinding(binding)
        self._past, self._present = self._present, self._past

    @property
    def bytes(self) -> int:
        return cache_bytes(self._manifest, self._provider)

    def copy_rows(self, other: KvCache, count: int) -> None:
        self.write(other.read(0, count))

    def read(self, first: int, last: int) -> KvRows:
        return np.stack([buffer.read()[0, :, first:last] for buffer in self._past])

    def write(self, rows: Sequence[KvRows] | KvRows) -> None:
        block = self._checked(rows)
        whole = np.zeros(self._shape, self._type)
        for i, part in enumerate(block):  # one layer at a time, so that the device needs no memory for a second cache
            whole[0, :, : part.shape[1]] = part
            self._past[i] = make_buffers(self._provider, [whole])[0]
        self.length = block.shape[2]

    def _allocate(self) -> None:
        """Allocates nothing: the buffers are on the device."""


def new_cache(manifest: Manifest, provider: Provider) -> KvCache:
    """An empty cache in the memory that the provider needs; BadArtifact if it is too large for the device."""
    if provider.key == CPU.key:
        return KvCache(manifest)
    return CopiedKvCache(manifest) if provider.memory == HOST else DeviceKvCache(manifest, provider)


def too_large(manifest: Manifest, provider: Provider, made: int, needed: int) -> BadArtifact:
    """The error for a cache that the device has no memory for.

    needed: the number of buffers of the cache; made: the number for which there was memory.
    """
    buffer = buffer_bytes(manifest) / 2**20
    capacity = possible_capacity(manifest.kv_rows, made, needed)
    fix = f"{capacity} tokens would fit: export it with --context-length {capacity}" if capacity else "none would fit"
    return BadArtifact(
        f"{manifest.source.model}: the KV cache of {manifest.capacity} tokens takes {needed * buffer:.0f} MiB, of "
        f"which {made * buffer:.0f} MiB fit on {provider.title}; {fix}, or take another provider"
    )


def buffer_bytes(manifest: Manifest) -> int:
    """The size of one buffer: the keys, or the values, of one layer."""
    spec = manifest.spec
    return spec.kv_heads * manifest.kv_rows * spec.head_dim * np.dtype(manifest.kv_dtype).itemsize


def cache_bytes(manifest: Manifest, provider: Provider) -> int:
    """The size of a conversation's cache. Two buffers that take turns count as two."""
    one = 2 * manifest.spec.layers * buffer_bytes(manifest)
    return 2 * one if provider.memory != HOST and takes_turns(manifest, provider) else one


def takes_turns(manifest: Manifest, provider: Provider) -> bool:
    """Whether past and present are two buffers on the device, which take turns."""
    return manifest.attention not in provider.in_place


def possible_capacity(rows: int, made: int, needed: int) -> int:
    """The largest capacity for which the device has memory; 0 if there is none. Arguments as of `too_large`."""
    return max(0, int(USABLE_SHARE * rows * made / needed) - KV_MARGIN)
