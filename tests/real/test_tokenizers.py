"""Real tokenizers: ids, texts and streams are those of transformers."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
from real import NPM, npm_tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from pard_onnx.runtime.text.tokenizer import Text

pytestmark = pytest.mark.real
TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "  leading, trailing  \n\n\n and\ttabs\r\n",
    "Größe, naïve café, Ελληνικά, русский, العربية, עברית, हिन्दी, ไทย, 日本語のテキスト, 한국어",
    "👩‍👩‍👧‍👦 🏳️‍🌈 e\u0301 \u200b \ufeff",
    "def f(x: int) -> str:\n    return f'{x:>8}'  # 3.14159e-10 0xFF",
    "<|im_start|>user\nHi<|im_end|>\n<think>\n</think><tool_call>",
    "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>",
    "1234567890 12,345.67 don't we'll I'M",
    "\u0000\u0001\x7f",
)


@pytest.fixture(scope="module", params=NPM)
def both(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[PreTrainedTokenizerBase, Text]:
    folder: Path = npm_tokenizer(request.param, tmp_path_factory.mktemp(request.param))
    return AutoTokenizer.from_pretrained(folder), Text(folder, None)


def test_the_vocabulary_is_that_of_transformers(both: tuple[PreTrainedTokenizerBase, Text]) -> None:
    reference, ours = both
    assert reference.get_vocab() == ours.vocabulary()
    assert reference.special_tokens_map == dict(ours.special_tokens)
    assert set(reference.all_special_tokens) <= set(ours.special_ids())


@pytest.mark.parametrize("text", TEXTS)
def test_ids_and_texts(both: tuple[PreTrainedTokenizerBase, Text], text: str) -> None:
    reference, ours = both
    ids = reference(text).input_ids
    assert ids == ours.encode(text)
    assert reference.decode(ids, skip_special_tokens=True) == ours.decode(ids)


@pytest.mark.parametrize("text", TEXTS)
def test_a_stream_of_tokens_is_their_text(both: tuple[PreTrainedTokenizerBase, Text], text: str) -> None:
    reference, ours = both
    ids = reference(text, add_special_tokens=False).input_ids
    for split in (0, len(ids) // 2):
        stream = ours.stream(ids[:split])
        whole = "".join(map(stream.push, ids[split:])) + stream.finish()
        if split == 0 or not reference.decode(ids[:split]).endswith("\ufffd"):
            before = reference.decode(ids[:split], skip_special_tokens=True)
            assert before + whole == reference.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("seed", range(5))
def test_a_stream_of_any_tokens_is_their_text(both: tuple[PreTrainedTokenizerBase, Text], seed: int) -> None:
    reference, ours = both
    random = Random(seed)
    ids = [random.randrange(len(reference)) for _ in range(300)]
    stream = ours.stream([])
    assert "".join(map(stream.push, ids)) + stream.finish() == reference.decode(ids, skip_special_tokens=True)
