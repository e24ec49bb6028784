"""Grouped-query attention on a KV cache, said as literally as numpy allows, and random steps for it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]


@dataclass(frozen=True)
class Step:
    """New rows of one sequence, and the caches before them."""

    queries: Floats  # [rows, heads, dim]
    keys: Floats  # [rows, kv_heads, dim]
    values: Floats
    key_cache: Floats  # [kv_heads, capacity, dim]
    value_cache: Floats
    past: int
    cosines: Floats  # [capacity, half]
    sines: Floats
    scale: float
    window: int = 0  # how many keys a row sees, its own included; 0: all

    @property
    def rows(self) -> int:
        return len(self.queries)

    def packed(self) -> Floats:
        """[1, rows, (heads + 2 * kv_heads) * dim]"""
        parts = (self.queries, self.keys, self.values)
        return np.concatenate([part.reshape(1, self.rows, -1) for part in parts], axis=2)

    def part(self, first: int, last: int, key_cache: Floats, value_cache: Floats) -> Step:
        """Rows first .. last - 1 alone, on caches that hold the rows before them."""
        new = {name: np.ascontiguousarray(getattr(self, name)[first:last]) for name in ("queries", "keys", "values")}
        return replace(self, **new, key_cache=key_cache, value_cache=value_cache, past=self.past + first)


def random_step(
    rng: np.random.Generator, rows: int, past: int, heads: int, kv_heads: int, dim: int, spare: int = 0
) -> Step:
    """A cache with `spare` rows behind the step's, which hold numbers that nothing may see."""
    capacity = past + rows + spare
    angles = np.outer(np.arange(capacity), 1e4 ** (-2 * np.arange(dim // 2) / dim))
    cache = rng.standard_normal((2, kv_heads, capacity, dim)).astype(np.float32)
    cache[:, :, past:] = np.nan
    new = [rng.standard_normal((rows, count, dim)).astype(np.float32) for count in (heads, kv_heads, kv_heads)]
    return Step(
        *new,
        cache[0],
        cache[1],
        past,
        np.cos(angles).astype(np.float32),
        np.sin(angles).astype(np.float32),
        float(np.float32(rng.choice([0.3, 1, 4]) / dim**0.5)),
    )


def rotated(x: NDArray[np.floating], step: Step) -> Doubles:
    """Rotary embedding of [rows, heads, dim], halves turned against one another."""
    half = step.cosines.shape[1]
    positions = slice(step.past, step.past + len(x))
    cos, sin = (table[positions, None].astype(np.float64) for table in (step.cosines, step.sines))
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=2)


def attention(step: Step) -> tuple[Doubles, Doubles, Doubles, Doubles]:
    """[rows, heads, dim]: results, and what their rounding errors are relative to; the caches afterwards."""
    end, group = step.past + step.rows, step.queries.shape[1] // step.keys.shape[1]
    key_cache, value_cache = step.key_cache.astype(np.float64), step.value_cache.astype(np.float64)
    key_cache[:, step.past : end] = rotated(step.keys, step).transpose(1, 0, 2)
    value_cache[:, step.past : end] = step.values.transpose(1, 0, 2)
    queries = rotated(step.queries, step)
    out, magnitude = np.zeros(queries.shape), np.zeros(queries.shape)
    for row in range(step.rows):
        seen = step.past + row + 1
        first = max(0, seen - step.window) if step.window else 0
        for head in range(queries.shape[1]):
            keys, values = key_cache[head // group, first:seen], value_cache[head // group, first:seen]
            scores = step.scale * (keys @ queries[row, head])
            weights = np.exp(scores - scores.max())
            out[row, head] = weights / weights.sum() @ values
            magnitude[row, head] = weights / weights.sum() @ np.abs(values)
    return out, magnitude, key_cache, value_cache
