"""Tokenizers of GGUF files: the ids of the tokenizer that a file was made of, and of llama.cpp where it is there."""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import gguf_files
import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from pard_onnx.models.checkpoints.checkpoint import Checkpoint
from pard_onnx.models.checkpoints.gguf.byte_level import PRE_TOKENIZERS
from pard_onnx.models.checkpoints.gguf.file import GgufFile
from pard_onnx.models.checkpoints.gguf.tokenizer import GgufTokenizer
from pard_onnx.models.checkpoints.vocabulary import load_tokenizer
from pard_onnx.models.errors import BadCheckpoint

Tiny = Callable[..., Path]
TRAINING = (
    Path(__file__).read_text(encoding="utf-8")
    + "don't they'll we've 1234 56 naïve été über 你好 мир 😀 \n\n   x = 10\t# no"
)
PIECES = [
    *"abcdefXYZ 0123456789\n\t'\"()[]{}.,;:!?-_=+*/\\<>|#@$%^&~`",
    *(
        "  ",
        "\n\n",
        "\r\n",
        "é",
        "ß",
        "你",
        "日本",
        "한",
        "م",
        "हि",
        "न्",
        "😀",
        "🇩🇪",
        "\u200b",
        "\u00a0",
        "\u3000",
        "\x85",
    ),
    *(
        "'s",
        "'T",
        "'re",
        "'LL",
        "½",
        "²",
        "٣",
        "Ⅷ",
        "e\u0301",
        "\x1c",
        "<|im_end|>",
        "<s>",
        "</s>",
        "<unk>",
        "<x>",
        "▁",
    ),
]
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6


def texts(count: int = 200) -> Iterator[str]:
    rng = random.Random(0)
    yield from ("", " ", "\n", "a", "  a", " \n x", "12345678", TRAINING)
    for _ in range(count):
        yield "".join(rng.choices(PIECES, k=rng.randint(1, 30)))
    for _ in range(count // 3):
        yield rng.choice("a -=\n#x") * rng.randint(1, 40) + rng.choice("xb ")
        planes = ((1, 0x2FF), (1, 0x2FF), (0x300, 0xD7FF), (0xE000, 0x1FFFF))
        letters = [chr(rng.randint(*rng.choice(planes))) for _ in range(rng.randint(1, 30))]
        # The tables of two libraries differ in characters that only one of them knows
        yield "".join(letter for letter in letters if unicodedata.category(letter) not in ("Cn", "Co"))


def write(path: Path, tokens: list[str], types: list[int], **metadata: Any) -> GgufTokenizer:
    """A file that holds a tokenizer and what llama.cpp needs to open it; its tokenizer as it is read."""
    writer = gguf.GGUFWriter(path, "llama")
    facts = {"block_count": 1, "context_length": 64, "embedding_length": 64, "feed_forward_length": 64}
    values: dict[str, Any] = {f"llama.{key}": value for key, value in facts.items()}
    values |= {"llama.attention.head_count": 1, "llama.attention.layer_norm_rms_epsilon": 1e-5}
    values |= {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    for key, value in (values | {f"tokenizer.ggml.{key}": value for key, value in metadata.items()}).items():
        gguf_files.add(writer, key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return GgufTokenizer.read(GgufFile.read(path).metadata)


def agree_with_llama_cpp(path: Path, found: GgufTokenizer) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    theirs, mine = llama_cpp.Llama(str(path), vocab_only=True, verbose=False), Tokenizer.from_str(found.json())
    for special in (False, True):
        for text in texts():
            expected = theirs.tokenize(text.encode(), add_bos=special, special=True)
            assert expected == mine.encode(text, add_special_tokens=special).ids, repr(text)
    vocabulary = llama_cpp.llama_model_get_vocab(theirs.model)
    ends = [i for i in range(theirs.n_vocab()) if llama_cpp.llama_vocab_is_eog(vocabulary, i)]
    assert ends == sorted(found.ends())
    theirs.close()


@pytest.fixture(scope="module")
def byte_level() -> Tokenizer:
    """Its merges cross the places where any pre-tokenizer cuts: a wrong cut gives other ids."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=6000, initial_alphabet=alphabet, show_progress=False, min_frequency=1, max_token_length=12
    )
    words = [text[i : i + 4] for text in texts() for i in range(len(text) - 1)]
    words = [word for word in words if not {"<", ">"} & set(word)]  # those of special tokens stay out of the vocabulary
    tokenizer.train_from_iterator(words, trainer)
    return tokenizer


def parts(tokenizer: Tokenizer) -> tuple[list[str], list[str]]:
    """Tokens and merges."""
    import json

    model = json.loads(tokenizer.to_str())["model"]
    return sorted(model["vocab"], key=model["vocab"].get), [" ".join(pair) for pair in model["merges"]]


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_every_pre_tokenizer(tmp_path: Path, byte_level: Tokenizer, pre: str) -> None:
    tokens, merges = parts(byte_level)
    types = [NORMAL] * len(tokens) + [CONTROL, CONTROL, USER_DEFINED]
    tokens += ["<|im_end|>", "<s>", "<x>"]
    path = tmp_path / "model.gguf"
    ids = {"bos_token_id": len(tokens) - 2, "eos_token_id": len(tokens) - 3}
    found = write(path, tokens, types, model="gpt2", pre=pre, merges=merges, **ids)
    if pre == "gpt-2":
        original = Tokenizer.from_str(byte_level.to_str())
        original.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        original.add_special_tokens(tokens[-3:])
        mine = Tokenizer.from_str(found.json())
        assert [original.encode(text).ids for text in texts()] == [mine.encode(text).ids for text in texts()]
    agree_with_llama_cpp(path, found)


@pytest.mark.parametrize("prefix", (None, True, False))
def test_sentencepiece(tmp_path: Path, prefix: bool | None) -> None:
    original = Tokenizer(models.BPE())
    original.normalizer = normalizers.Replace(" ", "▁")
    original.pre_tokenizer = pre_tokenizers.Split(Regex("▁*[^▁]*"), "isolated")
    original.train_from_iterator([TRAINING], trainers.BpeTrainer(vocab_size=700, show_progress=False))
    learned, merges = parts(original)
    order = {pair.replace(" ", ""): rank for rank, pair in enumerate(merges)}
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "<x>", "   ", *learned]
    types = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, USER_DEFINED, USER_DEFINED, *[NORMAL] * len(learned)]
    scores = [-float(order.get(token, 10_000 + i)) for i, token in enumerate(tokens)]
    path = tmp_path / "model.gguf"
    found = write(path, tokens, types, model="llama", scores=scores, add_space_prefix=prefix)
    mine = Tokenizer.from_str(found.json())
    for text in texts(100):
        plain = text.replace("▁", " ")
        if not any(special in plain for special in ("<unk>", "<s>", "</s>", "<x>", "   ")):
            assert mine.decode(mine.encode(plain, add_special_tokens=False).ids) == plain
    assert mine.encode("a").ids[0] == 1 and found.special("unknown") == 0 and found.special("eos") == 2
    agree_with_llama_cpp(path, found)


def test_what_sentencepiece_needs(tmp_path: Path) -> None:
    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "a", "b", "ab", "ba"]
    types = [UNKNOWN, *[BYTE] * 256, *[NORMAL] * 4]
    scores = [-float(index) for index in range(len(tokens))]
    broken: tuple[tuple[list[str], Any, str], ...] = (
        (
            tokens,
            [*scores[:-1], scores[-2]],
            "tokenizer.ggml.scores are equal for 'ab' and 'ba', so no order of merges",
        ),
        (tokens, scores[:-1], f"tokenizer.ggml.scores is no list of {len(tokens)} finite numbers"),
        (tokens, [*scores[:-1], float("nan")], f"tokenizer.ggml.scores is no list of {len(tokens)} finite numbers"),
        (tokens, None, f"tokenizer.ggml.scores is no list of {len(tokens)} finite numbers"),
        (["<unk>", "x", *tokens[2:]], scores, "tokenizer.ggml.tokens has no <0x00>"),
    )
    for number, (own, given, message) in enumerate(broken):
        with pytest.raises(BadCheckpoint, match=message.replace(".", r"\.")):
            write(tmp_path / f"{number}.gguf", own, types, model="llama", scores=given)


def test_first_and_last_ids(tmp_path: Path, byte_level: Tokenizer) -> None:
    tokens, merges = parts(byte_level)
    types = [NORMAL] * len(tokens) + [CONTROL] * 2
    tokens += ["<s>", "</s>"]
    first, last = len(tokens) - 2, len(tokens) - 1
    cases: tuple[tuple[str, Mapping[str, Any], bool, bool], ...] = (
        ("gpt-2", {}, False, False),
        ("gpt-2", {"add_bos_token": True}, True, False),
        ("gpt-2", {"add_bos_token": True, "add_eos_token": True}, True, True),
        ("llama-bpe", {}, True, False),
        ("llama-bpe", {"add_bos_token": False}, False, False),
    )
    for number, (pre, flags, begins, ends) in enumerate(cases):
        ids = {"bos_token_id": first, "eos_token_id": last}
        found = write(tmp_path / f"{number}.gguf", tokens, types, model="gpt2", pre=pre, merges=merges, **ids, **flags)
        encoded = Tokenizer.from_str(found.json()).encode("a b").ids
        assert (begins, ends) == (encoded[0] == first, encoded[-1] == last)


def test_tokens_that_are_no_text(tmp_path: Path, byte_level: Tokenizer) -> None:
    """Padding at the end is left out, empty tokens get a name, the same token twice is refused."""
    tokens, merges = parts(byte_level)
    size = len(tokens)
    types = [*[NORMAL] * (size + 1), *[5] * 8]
    padded = [*tokens, "", *(f"[PAD{i}]" for i in range(8))]
    found = write(
        tmp_path / "0.gguf", padded, types, model="gpt2", pre="gpt-2", merges=merges, padding_token_id=size + 4
    )
    assert len(found.tokens) == size + 1 and found.tokens[-1] == f"[EMPTY_{size}]" and found.special("padding") is None
    with pytest.raises(BadCheckpoint, match=r"tokenizer\.ggml\.tokens has '!' twice"):
        write(tmp_path / "1.gguf", [*tokens, "!"], [NORMAL] * (size + 1), model="gpt2", pre="gpt-2", merges=merges)
    with pytest.raises(BadCheckpoint, match=r"tokenizer\.ggml\.tokens has no token that is used"):
        write(tmp_path / "2.gguf", ["a"], [5], model="gpt2", pre="gpt-2", merges=merges)
    with pytest.raises(BadCheckpoint, match=r"tokenizer\.ggml\.merges has 'ab', which is no pair"):
        write(tmp_path / "3.gguf", tokens, [NORMAL] * size, model="gpt2", pre="gpt-2", merges=["ab"])


def test_a_checkpoint_keeps_its_tokenizer(tiny: Tiny, tmp_path: Path) -> None:
    path, folder = tmp_path / "model.gguf", tiny(tmp_path / "tiny", "qwen2")
    gguf_files.write(path, folder)
    found = Checkpoint.open(path)
    original, mine = (load_tokenizer(at / "tokenizer.json") for at in (folder, found.folder))
    for text in (*texts(100), "<|im_start|>user\nhello<|im_end|>\n"):
        encoded = original.encode(text).ids
        assert encoded == mine.encode(text).ids
        assert original.decode(encoded, skip_special_tokens=False) == mine.decode(encoded, skip_special_tokens=False)
    assert found.spec.chat_template == Checkpoint.open(folder).spec.chat_template
    assert np.array_equal(found.spec.vocabulary.eos_ids, (299, 297))
