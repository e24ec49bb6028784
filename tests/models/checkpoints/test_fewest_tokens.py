"""The fewest tokens of a text are never more than it has, whatever the tokenizer; long texts can be interrupted."""

from __future__ import annotations

import signal
import time
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from pard_onnx.models.checkpoints import tokenizer as module
from pard_onnx.models.checkpoints.fewest_tokens import BYTE_FALLBACK, fewest_tokens
from pard_onnx.models.checkpoints.tokenizer import LONG, GuardedTokenizer
from pard_onnx.models.errors import BadInput, Failure

WORDS = ["a", "b", "ab", "aa", "aaaa", "▁", "▁▁", "▁a", "é", "中"]
MERGES = [("a", "b"), ("a", "a"), ("aa", "aa"), ("▁", "▁"), ("▁", "a")]


def byte_level(*, lacking: str = "", **options: Any) -> Tokenizer:
    alphabet = [letter for letter in sorted(pre_tokenizers.ByteLevel.alphabet()) if letter not in lacking]
    words = [*alphabet, "ab", "aa", "aaaa", "ĠĠ", "ĠĠĠĠ"]
    merges = [("a", "b"), ("a", "a"), ("aa", "aa"), ("Ġ", "Ġ"), ("ĠĠ", "ĠĠ")]
    out = Tokenizer(models.BPE({word: id_ for id_, word in enumerate(words)}, merges, **options))
    out.pre_tokenizer, out.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return out


def byte_fallback() -> Tokenizer:
    words = [*WORDS, *sorted(BYTE_FALLBACK)]
    vocabulary = {word: id_ for id_, word in enumerate(words)}
    out = Tokenizer(models.BPE(vocabulary, MERGES, byte_fallback=True, unk_token="a", fuse_unk=True))
    out.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return out


def changed(tokenizer: Tokenizer, **parts: Any) -> Tokenizer:
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    tokenizer.add_tokens([AddedToken("<|end|>", lstrip=True, rstrip=True), AddedToken("ababababab", normalized=True)])
    return tokenizer


BOUNDED = {
    "byte level": byte_level(),
    "byte fallback": byte_fallback(),
    "trims": changed(byte_level()),
    **{name: changed(byte_level(), normalizer=getattr(normalizers, name)()) for name in ("NFC", "NFKC", "NFD", "NFKD")},
    "lower case": changed(byte_level(), normalizer=normalizers.Lowercase()),
    "byte fallback, NFKC": changed(byte_fallback(), normalizer=normalizers.NFKC()),
    "split": byte_level(),
}
BOUNDED["split"].pre_tokenizer = pre_tokenizers.Sequence(
    [pre_tokenizers.Split(Regex(r"\s+"), "isolated"), pre_tokenizers.ByteLevel(use_regex=False)]
)
UNBOUNDED = {
    "strips": changed(byte_level(), normalizer=normalizers.Strip()),
    "deletes": changed(byte_level(), normalizer=normalizers.Replace("a", "")),
    "shortens": changed(byte_level(), normalizer=normalizers.Replace("aa", "a")),
    "replaces": changed(byte_level(), normalizer=normalizers.Replace(Regex("a+"), "aa")),
    "accents": changed(byte_level(), normalizer=normalizers.StripAccents()),
    "removes": changed(byte_level(), pre_tokenizer=pre_tokenizers.Split("a", "removed")),
    "whitespace": changed(byte_level(), pre_tokenizer=pre_tokenizers.Whitespace()),
    "no pre-tokenizer": changed(byte_level(), pre_tokenizer=None),
    "a byte lacks": byte_level(lacking="z"),
    "unknown": byte_level(unk_token="a", fuse_unk=True, lacking="z"),
    "words": Tokenizer(models.WordLevel({"a": 0}, unk_token="a")),
    "pieces": Tokenizer(models.WordPiece({"a": 0}, unk_token="a")),
    "unigram": Tokenizer(models.Unigram([("a", 0.0)], unk_id=0)),
}
SHORTER = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
SHORTER = [one for one in SHORTER if len(unicodedata.normalize("NFKC", one).encode()) < len(one.encode())]


@pytest.mark.parametrize("name", BOUNDED)
@settings(max_examples=150, deadline=None)
@given(
    text=st.lists(
        st.sampled_from(
            ["a", "ab", " ", "  ", "\n", "ababababab", "<|end|>", "é", "e\u0301\u0323", "中", "K", "ᄀ", "ᅡ"]
        )
        | st.sampled_from(SHORTER)
        | st.text(max_size=4),
        max_size=60,
    ).map(lambda texts: "".join(texts) * 3)
)
def test_a_text_has_no_fewer_tokens(name: str, text: str) -> None:
    known = fewest_tokens(BOUNDED[name])
    assert known and known.of(text) <= len(BOUNDED[name].encode(text).ids)


@pytest.mark.parametrize("name", BOUNDED)
@pytest.mark.parametrize("unit", ["a", "ab", " ", "\u212a", "e\u0301", "α\u0313\u0300\u0345", "ᄀ" + "ᅡ" + "ᆨ", "𝐀"])
def test_a_text_of_one_repeated_character_has_no_fewer_tokens(name: str, unit: str) -> None:
    known = fewest_tokens(BOUNDED[name])
    assert known and known.of(unit * 2000) <= len(BOUNDED[name].encode(unit * 2000).ids)
    assert known.of("a" * 2000) >= 200


@pytest.mark.parametrize("name", UNBOUNDED)
def test_nothing_is_known_where_text_may_vanish(name: str) -> None:
    assert fewest_tokens(UNBOUNDED[name]) is None
    assert GuardedTokenizer(UNBOUNDED[name], Path("x"), BadInput).fewest_tokens("b" * (LONG + 1)) <= 1


@pytest.mark.parametrize("name", BOUNDED)
def test_a_long_text_has_the_same_ids(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    guarded = GuardedTokenizer(BOUNDED[name], Path("x"), BadInput)
    for text in ("ab e\u0301<|end|>  中" * 20, "", "a"):
        monkeypatch.setattr(module, "LONG", LONG)
        wanted = guarded.encode(text).ids
        monkeypatch.setattr(module, "LONG", -1)
        assert wanted == guarded.encode(text).ids


def test_errors_of_a_long_text_are_those_of_a_short_one(monkeypatch: pytest.MonkeyPatch) -> None:
    lacking = GuardedTokenizer(Tokenizer(models.WordLevel({"a": 0}, unk_token="?")), Path("x"), BadInput)
    messages = []
    for longest in (LONG, -1):
        monkeypatch.setattr(module, "LONG", longest)
        with pytest.raises(BadInput) as caught:
            lacking.encode("b")
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs a timer that sends a signal")
def test_a_signal_and_a_deadline_end_the_encoding_of_a_long_text() -> None:
    guarded = GuardedTokenizer(BOUNDED["NFC"], Path("x"), BadInput)
    text = "the quick brown fox é " * 80_000  # takes a second
    start = time.perf_counter()
    with pytest.raises(Failure, match=r"the time is over, and the prompt of 1,760,000 characters is not encoded"):
        guarded.encode(text, deadline=start + 0.1)
    assert time.perf_counter() < start + 1

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    start = time.perf_counter()
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    try:
        with pytest.raises(KeyboardInterrupt):
            guarded.encode(text)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert time.perf_counter() < start + 1
