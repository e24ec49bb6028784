"""The bytes of single tokens: joined, they are what the tokenizers library decodes."""

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers

from pard_onnx.runtime.text.tokenizer import Text

SIZE = 280
WORDS = ["<unk>", "▁", "▁▁", "▁the", "▁fox", "s", "é", *(f"<0x{byte:02X}>" for byte in range(256)), "<0xé0>", "<0x4>"]
PIECES = decoders.Sequence(
    [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
)


@pytest.fixture(scope="module")
def byte_level(make_tokenizer: Callable[[int], Tokenizer], tmp_path_factory: pytest.TempPathFactory) -> Text:
    return text_of(make_tokenizer(SIZE), tmp_path_factory.mktemp("bytes"))


@pytest.fixture(scope="module", params=["as Llama 2", "without stripping", "Metaspace"])
def pieces(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Text:
    tokenizer = Tokenizer(models.WordLevel({word: id_ for id_, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = {
        "as Llama 2": PIECES,
        "without stripping": decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]),
        "Metaspace": decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()]),
    }[request.param]
    return text_of(tokenizer, tmp_path_factory.mktemp("pieces"))


def text_of(tokenizer: Tokenizer, folder: Path) -> Text:
    tokenizer.save(str(folder / "tokenizer.json"))
    return Text(folder, None)


def joined(text: Text, ids: list[int]) -> str:
    return b"".join(map(text.token_bytes, ids)).decode(errors="replace")


@given(written=st.text(max_size=20))
def test_bytes_of_byte_level_tokens_are_the_text(byte_level: Text, written: str) -> None:
    ids = byte_level.encode(written)
    assert b"".join(map(byte_level.token_bytes, ids)) == written.encode()


@given(ids=st.lists(st.integers(0, SIZE - 1), max_size=12))
def test_any_ids_join_to_their_decoding(byte_level: Text, ids: list[int]) -> None:
    assert joined(byte_level, ids) == byte_level.decode(ids, skip_special_tokens=False)


WHOLE = [id_ for id_, word in enumerate(WORDS) if not (word.startswith("<0x") and len(word) == 6 and word != "<0xé0>")]


def bytes_of(character: str) -> list[int]:
    return [WORDS.index(f"<0x{byte:02X}>") for byte in character.encode()]


@given(st.lists(st.sampled_from(WHOLE).map(lambda id_: [id_]) | st.characters().map(bytes_of), min_size=1, max_size=12))
def test_any_pieces_join_to_their_decoding(pieces: Text, groups: list[list[int]]) -> None:
    ids = [id_ for group in groups for id_ in group]
    decoded = pieces.decode([WORDS.index("s"), *ids])  # after a first token, which decoders treat in another way
    assert "s" + joined(pieces, ids) == decoded


def test_bytes_that_broken_characters_are_made_of(pieces: Text) -> None:
    assert [pieces.token_bytes(WORDS.index(f"<0x{byte:02X}>")) for byte in "é".encode()] == [b"\xc3", b"\xa9"]


def test_special_tokens_have_the_bytes_of_their_text(byte_level: Text) -> None:
    assert byte_level.token_bytes(SIZE - 1) == b"<|im_end|>"


def test_an_id_without_a_token_has_no_bytes(byte_level: Text) -> None:
    assert byte_level.token_bytes(SIZE + 5) == b""
