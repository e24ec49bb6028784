"""The target's folder in the real onnxruntime-genai."""

from collections.abc import Callable
from pathlib import Path

import pytest

from pard_onnx import load
from pard_onnx.models.families import FAMILIES

genai = pytest.importorskip("onnxruntime_genai")
PROMPT = list(range(20, 45))


@pytest.mark.parametrize("precision", ("fp32", "int8", "int4"))
@pytest.mark.parametrize("family", FAMILIES)
def test_genai_gives_the_same_greedy_tokens(
    exported: Callable[..., tuple[Path, Path]], family: str, precision: str
) -> None:
    require_the_same_tokens(exported(family, "target", precision)[1])


def test_genai_runs_a_target_that_gives_hidden_states(exported: Callable[..., tuple[Path, Path]]) -> None:
    require_the_same_tokens(exported("qwen2", "target", "int4", feature_layers=(-1, -3, -2), verify=False)[1])


def require_the_same_tokens(artifact: Path) -> None:
    with load(artifact) as pair:
        # genai decodes one token a step, so the widths must be single here too.
        ours = list(pair.generate(PROMPT, max_new_tokens=24, exact=False).tokens)
    model = genai.Model(str(artifact))
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=len(PROMPT) + 24)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(PROMPT)
    while not generator.is_done():
        generator.generate_next_token()
    theirs = [int(token) for token in generator.get_sequence(0)[len(PROMPT) :]]
    if theirs and theirs[-1] == 299:  # EOS
        theirs.pop()
    assert ours == theirs
