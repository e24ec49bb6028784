"""The demo tokenizer: training, the special tokens' ids, and round trips."""

import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from pard_onnx.models.demo import corpus, tokenizer

TEXT = ["def walk(self, node):\n    for child in node:\n        self.visit(child)\n", "return self.visit(node)\n"] * 3
TRAINED = tokenizer.train(TEXT, size=300)


def test_it_has_exactly_the_size_and_the_special_tokens_last():
    assert TRAINED.get_vocab_size() == 300
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    assert [TRAINED.token_to_id(token) for token in special] == [297, 298, 299]


def test_a_text_with_too_few_merges_is_refused():
    with pytest.raises(ValueError, match=r"make \d+ ids, not 2040"):
        tokenizer.train(TEXT)


def test_training_again_gives_the_same():
    assert tokenizer.train(iter(TEXT), size=300).to_str() == TRAINED.to_str()


@settings(deadline=None)
@given(st.text())
@example(" \t\r\n  \n\n x")
@example("naïve 日本語 👩‍👩‍👧 \u0000 \ufeff é")
@example("a<|im_end|>b")
def test_any_text_comes_back(text):
    assert TRAINED.decode(TRAINED.encode(text).ids, skip_special_tokens=False) == text


def test_special_tokens_are_one_id_wherever_they_stand():
    ids = TRAINED.encode(corpus.chat("def", "return") + corpus.END_OF_TEXT).ids
    assert [i for i in ids if i >= 297] == [298, 299, 298, 299, 297]


def test_digits_stand_alone_and_words_take_their_space():
    trained = tokenizer.train(["x = 1234 1234 word word's\n"] * 9, size=265)
    tokens = [trained.decode([i]) for i in trained.encode("x 1234 word").ids]
    assert [t for t in tokens if t.strip().isdigit()] == ["1", "2", "3", "4"]
    assert tokens[-1] == " word"


def test_the_saved_folder_is_one_that_transformers_reads(tmp_path):
    tokenizer.save(TRAINED, tmp_path)
    assert Tokenizer.from_file(str(tmp_path / "tokenizer.json")).to_str() == TRAINED.to_str()
    config = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert (config["eos_token"], config["pad_token"]) == ("<|im_end|>", "<|endoftext|>")

    transformers = pytest.importorskip("transformers")
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
    messages = [{"role": "user", "content": "walk"}]
    text = loaded.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\nwalk<|im_end|>\n<|im_start|>assistant\n"
    assert loaded.eos_token_id == 299 and loaded.pad_token_id == 297
    assert loaded(text).input_ids == TRAINED.encode(text).ids
