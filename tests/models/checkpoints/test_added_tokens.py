"""Tokens of the files beside tokenizer.json: ids and texts are those of transformers' AutoTokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import pytest
from tiny import edit_json, save_json
from transformers import AutoTokenizer

from pard_onnx.models.checkpoints.checkpoint import Checkpoint
from pard_onnx.models.checkpoints.vocabulary import load_tokenizer
from pard_onnx.models.errors import BadCheckpoint, BadInput, PardWarning
from pard_onnx.runtime.text.tokenizer import Text

TEXTS = ("<|im_end|>", "<|endoftext|>", "<tool>", "<think>", " <pad> ", "the", "<a><b>", "Ġfox", "dogs")
NAMES = ("bos_token", "eos_token", "pad_token", "unk_token", "image_token", "eot_token")


def token(random: Random, text: str, *, typed: bool = False) -> dict[str, Any]:
    flags = {name: random.random() < 0.3 for name in ("lstrip", "rstrip", "single_word", "normalized", "special")}
    return {"content": text, **flags} | ({"__type": "AddedToken"} if typed else {})


def named(random: Random, *, typed: bool) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name in random.sample(NAMES, random.randrange(4)):
        text = random.choice(TEXTS)
        plain = random.random() < 0.5 or (not typed and name not in NAMES[:4])
        out[name] = text if plain else token(random, text, typed=typed)
    return out


def constructed(folder: Path, seed: int) -> None:
    """Replace the tokenizer files' added tokens by random ones."""
    random = Random(seed)
    value = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    value["added_tokens"] = value["added_tokens"][: random.randrange(4)]
    save_json(folder / "tokenizer.json", value)
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    config = {key: config[key] for key in ("tokenizer_class", "clean_up_tokenization_spaces")}
    config |= named(random, typed=True)
    if random.random() < 0.6:
        texts = random.sample(TEXTS, random.randrange(6))
        ids = random.sample(range(295, 330), len(texts))
        entries = zip(ids, texts, strict=True)
        config["added_tokens_decoder"] = {str(id_): token(random, text) for id_, text in entries}
    if random.random() < 0.5:
        config["extra_special_tokens"] = random.sample(TEXTS, 2)
    elif random.random() < 0.5:
        config["additional_special_tokens"] = random.sample(TEXTS, 2)
    save_json(folder / "tokenizer_config.json", config)
    if random.random() < 0.5:
        mapped = named(random, typed=False)
        if random.random() < 0.5:
            mapped["additional_special_tokens"] = random.sample(TEXTS, 2)
        save_json(folder / "special_tokens_map.json", mapped)
    if random.random() < 0.5:
        texts = random.sample(TEXTS, 3)
        save_json(folder / "added_tokens.json", {text: 300 + i for i, text in enumerate(texts)})


@pytest.mark.parametrize("seed", range(40))
def test_ids_are_those_of_transformers(tiny: Any, tmp_path: Path, seed: int) -> None:
    folder = tiny(tmp_path, "llama")  # transformers takes tokenizer.json as it is, unlike for Qwen's own class
    constructed(folder, seed)
    reference, ours = AutoTokenizer.from_pretrained(folder), load_tokenizer(folder / "tokenizer.json", BadCheckpoint)
    assert reference.get_vocab() == ours.get_vocab(with_added_tokens=True)
    text = " ".join(TEXTS) + "".join(TEXTS)
    ids = reference(text).input_ids
    assert ids == ours.encode(text).ids
    assert reference.decode(ids, skip_special_tokens=True) == ours.decode(ids, skip_special_tokens=True)
    assert reference.special_tokens_map == Text(folder, None).special_tokens
    assert Checkpoint.open(folder).spec.vocabulary.size == min(320, max(max(ours.get_vocab().values()) + 1, 300))


def test_a_token_of_the_config_alone_ends_texts(tiny: Any, tmp_path: Path) -> None:
    """Its logit is not masked, and in prompts it is one token."""
    folder = tiny(tmp_path, eos=[300])
    edit_json(folder / "tokenizer_config.json", added_tokens_decoder={"300": {"content": "<|eot|>", "special": True}})
    vocabulary = Checkpoint.open(folder).spec.vocabulary
    assert (vocabulary.size, vocabulary.eos_ids) == (301, (300,))
    assert Text(folder, None).encode("the<|eot|>") == [*Text(folder, None).encode("the"), 300]


def test_an_end_that_no_file_names_is_not_masked(tiny: Any, tmp_path: Path) -> None:
    assert Checkpoint.open(tiny(tmp_path, eos=[299, 310])).spec.vocabulary.size == 311


def test_added_tokens_may_lie_past_the_embedding_and_ordinary_ones_may_not(tiny: Any, tmp_path: Path) -> None:
    folder = tiny(tmp_path, vocab_rows=300)
    edit_json(folder / "tokenizer_config.json", pad_token="<pad>")
    vocabulary = Checkpoint.open(folder).spec.vocabulary
    assert (vocabulary.rows, vocabulary.size) == (300, 300)
    edit_json(folder / "config.json", vocab_size=296, eos_token_id=0)
    edit_json(folder / "generation_config.json", eos_token_id=0)
    with pytest.raises(BadCheckpoint, match="vocab_size is 296, but the tokenizer has 301 ids"):
        Checkpoint.open(folder)


BAD = [
    ("tokenizer_config.json", {"added_tokens_decoder": []}, "added_tokens_decoder is"),
    ("tokenizer_config.json", {"added_tokens_decoder": {"x": {"content": "a"}}}, "a key of added_tokens_decoder"),
    ("tokenizer_config.json", {"added_tokens_decoder": {"5": {"content": 3}}}, "added_tokens_decoder.5 is"),
    ("tokenizer_config.json", {"added_tokens_decoder": {"5": {"content": "a", "lstrip": 1}}}, "lstrip of"),
    ("tokenizer_config.json", {"eos_token": 7}, "eos_token is 7"),
    (
        "tokenizer_config.json",
        {"extra_special_tokens": "<a>"},
        "extra_special_tokens (additional_special_tokens in older files) is '<a>'",
    ),
    ("tokenizer_config.json", {"extra_special_tokens": [None]}, "in older files) is None"),
    ("tokenizer_config.json", {"additional_special_tokens": 5}, "additional_special_tokens in older files) is 5"),
    ("special_tokens_map.json", {"additional_special_tokens": 5}, "additional_special_tokens in older files) is 5"),
    (
        "tokenizer_config.json",
        {"added_tokens_decoder": {"-1": {"content": "a"}}},
        "a key of added_tokens_decoder is -1;",
    ),
    ("tokenizer_config.json", {"added_tokens_decoder": {str(10**20): {"content": "a"}}}, "is 100000000000000000000;"),
    ("added_tokens.json", {"<a>": -1}, "'<a>' is -1; it must be a token id, a whole number from 0 to 4294967295"),
    ("added_tokens.json", {"<a>": 10**20}, "'<a>' is 100000000000000000000; it must be a token id"),
    ("added_tokens.json", {"<a>": True}, "'<a>' is True; it must be a token id"),
    ("special_tokens_map.json", {"pad_token": {}}, "pad_token is {}"),
    ("tokenizer_config.json", {"pad_token": "half \ud83d"}, "pad_token is "),
    ("added_tokens.json", {"\ud83d": 300}, "is {'content'"),
    ("added_tokens.json", {"<a>": "300"}, "'<a>' is '300'"),
]


@pytest.mark.parametrize("id_", [-1, 10**20, 2**32, 1.5, "5", None, True])
@pytest.mark.parametrize("added", [True, False])
def test_what_is_not_an_id_in_the_tokenizer_is_named(tiny: Any, tmp_path: Path, id_: Any, added: bool) -> None:
    folder = tiny(tmp_path)
    value = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    if added:
        value["added_tokens"][-1]["id"] = id_
        text = value["added_tokens"][-1]["content"]
    else:
        text = next(iter(value["model"]["vocab"]))
        value["model"]["vocab"][text] = id_
    save_json(folder / "tokenizer.json", value)
    for load in (lambda: Checkpoint.open(folder), lambda: load_tokenizer(folder / "tokenizer.json")):
        with pytest.raises(BadInput) as caught:
            load()
        assert f"{folder / 'tokenizer.json'}: the id of the token {text!r} is {id_!r}; it must be" in str(caught.value)


def test_dropout_of_a_tokenizer_is_switched_off(tiny: Any, tmp_path: Path) -> None:
    folder = tiny(tmp_path)
    path = folder / "tokenizer.json"
    wanted = load_tokenizer(path).encode("the quick brown fox").ids
    value = json.loads(path.read_text(encoding="utf-8"))
    value["model"]["dropout"] = 0.5
    save_json(path, value)
    with pytest.warns(PardWarning, match=r"tokenizer.json: BPE dropout of 0.5, .* is switched off"):
        tokenizer = load_tokenizer(path)
    for _ in range(5):
        assert tokenizer.encode("the quick brown fox").ids == wanted
    load_tokenizer(path)  # which warns no second time


@pytest.mark.parametrize(("name", "value", "problem"), BAD)
def test_what_is_not_a_token_is_named(tiny: Any, tmp_path: Path, name: str, value: Any, problem: str) -> None:
    folder = tiny(tmp_path)
    save_json(folder / name, value)
    with pytest.raises(BadCheckpoint) as caught:
        Checkpoint.open(folder)
    assert str(caught.value).startswith(f"{folder / name}: ") and problem in str(caught.value)
    assert "\n" not in str(caught.value)
