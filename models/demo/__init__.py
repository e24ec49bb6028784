"""The models that ship with the package, as Hugging Face checkpoint folders: a target, its PARD draft, the PARD-2 draft
that was trained on from it, and the autoregressive draft that the PARD draft was adapted from."""

import json
from pathlib import Path

TARGET = Path(__file__).parent / "target"
DRAFT = Path(__file__).parent / "draft"
PARD2_DRAFT = Path(__file__).parent / "pard2-draft"
AR_DRAFT = Path(__file__).parent / "ar-draft"
# The pair as pard-export writes it for the CPU in int4, so that it runs without torch; .ci/demo-pair makes it
EXPORTED_TARGET = Path(__file__).parent / "exported" / "demo-target-int4"
EXPORTED_DRAFT = Path(__file__).parent / "exported" / "demo-draft-int4"


def prompts() -> list[str]:
    """The beginnings of modules and functions that the pair was not trained on."""
    texts: list[str] = json.loads((Path(__file__).parent / "prompts.json").read_text(encoding="utf-8"))
    return texts
