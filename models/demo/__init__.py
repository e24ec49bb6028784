"""The pair that ships with the package: a target and its PARD draft, as Hugging Face checkpoint folders."""

import json
from pathlib import Path

TARGET = Path(__file__).parent / "target"
DRAFT = Path(__file__).parent / "draft"


def prompts() -> list[str]:
    """The beginnings of modules and functions that the pair was not trained on."""
    texts: list[str] = json.loads((Path(__file__).parent / "prompts.json").read_text(encoding="utf-8"))
    return texts
