"""The pair that ships with the package: a target and its PARD draft, as Hugging Face checkpoint folders."""

from pathlib import Path

TARGET = Path(__file__).parent / "target"
DRAFT = Path(__file__).parent / "draft"
