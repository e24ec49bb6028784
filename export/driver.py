"""An exported graph driven by plain feeds, nothing of the runtime's: what the parity check and calibration run."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from pard_onnx.models.spec import ModelSpec

Logits = NDArray[np.float32]
Rows = NDArray[np.generic]
DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int8)": np.int8}  # of KV caches


@dataclass(slots=True)
class Driver:
    """`length` tokens are in its cache. caches: past_key_values by name, [1, kv_heads, rows, head_dim]."""

    session: ort.InferenceSession
    spec: ModelSpec
    caches: dict[str, Rows] = field(default_factory=dict)
    length: int = 0

    @classmethod
    def open(cls, path: Path, spec: ModelSpec, rows: int) -> Driver:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        types = {value.name: DTYPES.get(value.type) for value in session.get_inputs()}
        shape = (1, spec.kv_heads, rows, spec.head_dim)
        names = [f"past_key_values.{i}.{part}" for i in range(spec.layers) for part in ("key", "value")]
        return cls(session, spec, {name: np.zeros(shape, types[name]) for name in names})

    def step(self, ids: NDArray[np.int64], draft_length: int = 1) -> Logits:
        """Logits of a step: all its rows [n, vocabulary], or the last K of a draft."""
        total = self.length + len(ids)
        feeds = {"input_ids": ids[None], "attention_mask": np.ones((1, total), np.int64), **self.caches}
        if self.spec.pard is not None:
            feeds["draft_length"] = np.array([draft_length])
        presents = [name.replace("past_key_values", "present") for name in self.caches]
        logits, *caches = self.session.run(["logits", *presents], feeds)
        self.caches = dict(zip(self.caches, caches, strict=True))
        self.length = total
        rows: Logits = logits[0]
        return rows
