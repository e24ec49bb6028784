"""On quantized targets, drafts change neither a token nor a bit of the logits that it was chosen from."""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from pard_onnx import Pair, load
from pard_onnx.benchmarks.trial import SHIPPED, read_prompts
from pard_onnx.models.demo import corpus
from pard_onnx.runtime import engine
from pard_onnx.runtime.decoding.ahead import AheadPolicy
from pard_onnx.runtime.sampling.sampler import Chooser, Logits, chooser

Folder = Callable[[str, str], Path]
Read = dict[int, tuple[int, bytes]]  # by position: the token, and the logits that it was chosen from
SAMPLED = {"temperature": 0.9, "top_p": 0.95, "repetition_penalty": 1.1, "seed": 5}


class Recorder:
    """A chooser that keeps the rows it was shown, as far as they led to a token."""

    def __init__(self, inner: Chooser, seen: Read) -> None:
        self._inner, self._seen = inner, seen

    def choose(self, rows: Logits, committed: Sequence[int], drafts: Sequence[int]) -> list[int]:
        tokens = self._inner.choose(rows, committed, drafts)
        for i, token in enumerate(tokens):
            self._seen[len(committed) + i] = token, rows[i].tobytes()
        return tokens


@pytest.fixture(params=["", "off"], ids=["own kernel", "ONNX Runtime's kernel"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("PARD_ONNX_KERNEL", request.param)
    yield


def rows(pair: Pair, prompt: str, new: int, monkeypatch: pytest.MonkeyPatch, **options: object) -> Read:
    seen: Read = {}

    def recording(*arguments: Any) -> Chooser:
        return Recorder(chooser(*arguments), seen)

    monkeypatch.setattr(engine, "chooser", recording)
    stats = pair.generate(prompt, max_new_tokens=new, **options).stats  # type: ignore[arg-type]
    assert stats.exact
    assert stats.widths[0] == (2 if stats.kernel == "onnxruntime" else 1)
    # What a round verified behind EOS is not of the text.
    return {position: found for position, found in seen.items() if position < stats.prompt_tokens + stats.new_tokens}


def require_equal(
    pair: Pair, prompts: Sequence[str], new: int, ways: Sequence[dict[str, object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for prompt in prompts:
        for settings in ({}, SAMPLED):
            plain = rows(pair, prompt, new, monkeypatch, draft_length=0, **settings)
            for way in ways if not settings else ways[:2]:
                assert rows(pair, prompt, new, monkeypatch, **way, **settings) == plain, (prompt, way, settings)


@pytest.mark.parametrize("precision", ["int4", "int8"])
def test_drafts_change_no_bit(
    demo_folder: Folder, precision: str, kernel: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with load(demo_folder("demo-target", precision), demo_folder("demo-draft", "int8")) as pair:
        ways = [{}, {"draft_length": 7}, {"lookup": False}, {"draft_length": 4}]
        require_equal(pair, read_prompts(SHIPPED, 4).prompts, 48, ways, monkeypatch)


@pytest.mark.parametrize(
    "precision", ["int4", pytest.param("int8", marks=pytest.mark.slow), pytest.param("fp32", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("mode", ["target-dependent", "target-independent"])
def test_a_draft_that_reads_the_target_changes_no_bit(
    pard2_folder: Folder, precision: str, mode: Any, kernel: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random projections: what the draft proposes with them is of no matter here."""
    with load(pard2_folder("target", precision), pard2_folder("draft", precision), draft_mode=mode) as pair:
        ways = [{}, {"draft_length": 4}, {"lookup": False}, {"draft_length": 1}, {"draft_length": 16}]
        require_equal(pair, read_prompts(SHIPPED, 2).prompts, 40, ways, monkeypatch)
        stats = pair.generate(read_prompts(SHIPPED, 1).prompts[0], max_new_tokens=40, draft_length=4).stats
    assert ("pard2" if mode == "target-dependent" else "pard2-independent") in stats.sources


def test_drafting_ahead_changes_no_bit(demo_folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both models here, each in a thread of its own as if on a device of its own."""
    monkeypatch.setattr(engine, "on_separate_devices", lambda *_: True)
    monkeypatch.setattr(AheadPolicy, "length_to_request", lambda self, lag, k: k + 1)
    monkeypatch.setattr(AheadPolicy, "pays", lambda *_: True)
    with load(demo_folder("demo-target", "int4"), demo_folder("demo-draft", "int8"), threads=1) as pair:
        prompts = read_prompts(SHIPPED, 3).prompts
        require_equal(pair, prompts, 40, [{"draft_length": 2}, {}, {"draft_length": 5}], monkeypatch)
        stats = pair.generate(prompts[0], max_new_tokens=40, draft_length=1).stats
    assert stats.ahead >= stats.ahead_used > 0


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("precision", ["int4", "int8"])
def test_drafts_change_no_bit_of_many_texts(
    demo_folder: Folder, precision: str, kernel: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    heads = (head + "\n" for m in corpus.modules() if m.held_out for head, _ in corpus.functions(m) if len(head) > 60)
    ways = [{}, {"lookup": False}, *({"draft_length": k} for k in range(1, 13))]
    with load(demo_folder("demo-target", precision), demo_folder("demo-draft", "int8")) as pair:
        require_equal(pair, list(islice(heads, 50)), 128, ways, monkeypatch)
