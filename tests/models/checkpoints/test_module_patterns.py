"""Patterns of adapters: what Python's `re` matches, soon or not at all."""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path

import pytest

from pard_onnx.models.checkpoints import module_patterns
from pard_onnx.models.checkpoints.adapter import Adapter, _Merge
from pard_onnx.models.checkpoints.config import Config
from pard_onnx.models.checkpoints.module_patterns import ModulePatterns, NotAnExpression, Pattern, TooSlow
from pard_onnx.models.errors import BadCheckpoint

NAMES = [f"model.layers.{i}.{part}" for i in (0, 1, 12) for part in ("self_attn.q_proj", "mlp.down_proj")] + ["lm_head"]
HONEST = (
    "q_proj",
    r".*\.q_proj",
    r"(?i).*\.(Q|k)_PROJ",
    r"^(?!.*mlp).*proj$",
    r"(?:.*?(?:self_attn|mlp).*?(?:q_proj|down_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.mlp)",
    r"model\.layers\.(\d)\1?2\..*",
    "",
)
HOSTILE = (r"(\w+\.?)+!", r"(.*)*\1{9}x", r"((a|m|o|d|e|l|.)*)*$!", "(" + "(.*)" * 40 + ")!x")


@pytest.mark.parametrize("source", HONEST)
@pytest.mark.parametrize("whole", [True, False])
def test_matches_are_those_of_re(source: str, whole: bool) -> None:
    around = ("", "") if source.startswith("(?i)") else (r"(.*\.)?(", ")$")
    pattern = Pattern(source, *around, whole)
    found = ModulePatterns([pattern], NAMES)
    for name in NAMES:
        wanted = (re.fullmatch if whole else re.match)(pattern.expression, name)
        assert found.match(pattern, name) == (wanted is not None, None)
    layer = Pattern("", r".*?\.[^.]*", r"\.(?P<idx>\d+)\.")
    assert ModulePatterns([layer], NAMES).match(layer, NAMES[4]) == (True, "12")


@pytest.mark.parametrize("source", HOSTILE)
def test_a_pattern_that_backtracks_is_stopped(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module_patterns, "SECONDS", 1)
    start = time.perf_counter()
    with pytest.raises(TooSlow, match="takes more than 1 seconds"):
        ModulePatterns([Pattern(source)], ["a" * 50, *NAMES, "model.layers.0.self_attn.q_projmodel_layers" * 3])
    assert time.perf_counter() - start < 5


def test_without_a_helper_process_only_bounded_patterns_are_matched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    for source in HONEST[:4]:
        assert ModulePatterns([Pattern(source)], NAMES).match(Pattern(source), "q_proj") is not None
    for source in HOSTILE:
        with pytest.raises(TooSlow, match="no helper process can be started"):
            ModulePatterns([Pattern(source)], NAMES)


@pytest.mark.parametrize("source", ["(", "a**", "[", "(?P<idx>", "*"])
def test_what_is_no_expression(source: str) -> None:
    good, bad = Pattern("q.*"), Pattern(source)
    found = ModulePatterns([good, bad], NAMES)
    assert found.match(good, "lm_head") == (False, None)
    with pytest.raises(NotAnExpression):
        found.match(bad, "lm_head")


@pytest.mark.parametrize(
    "key", ["target_modules", "exclude_modules", "modules_to_save", "rank_pattern", "layers_pattern"]
)
def test_an_adapter_that_backtracks_is_refused(key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module_patterns, "SECONDS", 1)
    value = {"rank_pattern": {HOSTILE[0]: 4}}.get(key, HOSTILE[0] if key.startswith(("t", "e")) else [HOSTILE[0]])
    values = {"peft_type": "LORA", "target_modules": ["q_proj"], "layers_to_transform": [0], key: value}
    adapter = Adapter(tmp_path, Config(tmp_path / "adapter_config.json", json.loads(json.dumps(values))), {})
    merge = _Merge(adapter, dict.fromkeys(("model.layers.0.self_attn.q_proj_" + "a" * 40, "lm_head")), tied=False)  # type: ignore[arg-type]
    with pytest.raises(BadCheckpoint, match=r"adapter_config\.json: has patterns whose matching takes more than 1 sec"):
        merge._matches(key, Pattern("x"), "lm_head")
