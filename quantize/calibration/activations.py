"""`Scales`: what statically quantized activations are divided by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Scales:
    """By the names of matrices: of what a product reads, and of what it gives, where that is rounded too."""

    inputs: Mapping[str, np.float32]
    outputs: Mapping[str, np.float32]
