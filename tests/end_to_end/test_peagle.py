"""A P-EAGLE draft from its checkpoint to the text: the same commands as for other drafts, and the target's own text."""

from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import make_peagle

from pard_onnx import BadArtifact, load
from pard_onnx.export_command import main as export_main

PROMPTS = ("def the quick brown fox", "return self import for value in range: " * 12)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["int4", "int8", "fp32"])
def test_a_p_eagle_draft_changes_no_text(precision: str, tmp_path: Path, tiny: Callable[..., Path]) -> None:
    """Its target is of another family and has other layers and another size than the draft."""
    target = tiny(tmp_path / "target", "qwen3", "target", hidden=128, layers=4)
    draft = make_peagle(tiny(tmp_path / "draft", "llama", "draft"), target_hidden=128, layers=(1, 2, 3))
    out, drafted, plain = tmp_path / "out", tmp_path / "drafted", tmp_path / "plain"
    common = ["--precision", precision, "--accept-loss"]
    assert export_main([str(draft), *common, "--output", str(drafted)]) == 0
    assert export_main([str(target), "--for-draft", str(drafted), *common, "--no-verify", "--output", str(out)]) == 0
    assert export_main([str(target), *common, "--no-verify", "--output", str(plain)]) == 0
    with load(out, drafted, draft_mode="target-dependent", threads=1) as pair:
        for prompt in PROMPTS:
            for settings in ({}, {"temperature": 0.8, "seed": 3}):
                wanted = pair.generate(prompt, max_new_tokens=24, draft_length=0, **settings)
                for length in (1, 4, 16, "auto"):
                    found = pair.generate(prompt, max_new_tokens=24, draft_length=length, lookup=False, **settings)
                    assert found.tokens == wanted.tokens, (prompt, settings, length)
                    assert length == "auto" or "p-eagle" in found.stats.sources
    with pytest.raises(BadArtifact, match=r"exported with none; export it again: .*--features=-4,-3,-2"):
        load(plain, drafted, draft_mode="target-dependent")
