"""`Own`: the metadata of a GGUF file's own architecture, whose keys begin with the architecture's name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from pard_onnx.models.checkpoints.config import Config
from pard_onnx.models.errors import BadCheckpoint


@dataclass(frozen=True, slots=True)
class Own:
    """`Config`'s checks of values, with `prefix` before each key."""

    metadata: Config
    prefix: str  # the architecture's name and a dot

    def value(self, key: str) -> Any:
        """None: absent. One value for all layers where the file has one a layer and they are equal."""
        found = self.metadata.values.get(self.prefix + key)
        if not isinstance(found, np.ndarray):
            return found
        different = sorted(set(found.tolist()))
        if len(different) != 1:
            raise self.fault(key, "differs from layer to layer, which is not supported")
        return different[0]

    def integer(self, key: str, default: int | None = None, least: int = 1) -> int:
        return self._one(key).integer(self.prefix + key, default, least)

    def number(self, key: str, default: float | None = None) -> float:
        return shortest(self._one(key).number(self.prefix + key, default))

    def fault(self, key: str, problem: str) -> BadCheckpoint:
        return self.metadata.fault(self.prefix + key, problem)

    def require(self, key: str, wanted: int, why: str) -> None:
        """BadCheckpoint where the file has another number than `wanted`."""
        if (found := self.integer(key, wanted)) != wanted:
            raise self.fault(key, f"is {found}, {why}")

    def require_neutral(self, numbers: Mapping[str, float]) -> None:
        """BadCheckpoint where a number of the file is neither 0 nor the one of `numbers`, which changes nothing."""
        for key, neutral in numbers.items():
            if (found := self.value(key)) not in (None, 0, neutral):
                raise self.fault(key, f"is {found}, which is not supported")

    def _one(self, key: str) -> Config:
        return Config(self.metadata.path, {self.prefix + key: self.value(key)})


def texts(metadata: Config, key: str) -> list[str]:
    """A list of texts. Raises BadCheckpoint where it is missing, no such list, or not UTF-8."""
    found = metadata.values.get(key)
    if found is None:
        raise metadata.fault(key, "is missing; convert the model again")
    if not isinstance(found, list):
        raise metadata.fault(key, "is no list of texts; convert the model again")
    for index, item in enumerate(found):
        if isinstance(item, bytes):
            raise metadata.fault(key, f"has {item!r} at {index}, which is not UTF-8; convert the model again")
    return found


def shortest(value: float) -> float:
    """The shortest decimal number that rounds to the same float32: 1e-05 where the file has 9.99999974e-06."""
    return float(str(np.float32(value)))
