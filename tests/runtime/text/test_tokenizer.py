"""Text: streaming never shows half a character, and chat templates render as in transformers."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from pard_onnx.models.errors import BadArtifact, BadInput
from pard_onnx.runtime.text.tokenizer import Text, first_difference
from pard_onnx.runtime.text.writer import WINDOW, Detokenizer

SIZE = 280


@pytest.fixture(scope="module")
def folder(make_tokenizer: Callable[[int], Tokenizer], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(SIZE).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<|im_end|>"}, "x": 3}))
    return folder


@pytest.fixture(scope="module")
def text(folder: Path) -> Text:
    return Text(folder, "{{ messages[0].content }}{{ eos_token }}")


def pieces(detokenizer: Detokenizer, ids: Sequence[int]) -> list[str]:
    return [*(detokenizer.push(token) for token in ids), detokenizer.finish()]


@settings(max_examples=200, deadline=None)
@given(st.text("aé中😀 \n\ufffd", max_size=40), st.text("a é中", max_size=10))
def test_pieces_join_to_the_text_and_never_break_a_character(text: Text, written: str, prompt: str) -> None:
    out = pieces(text.stream(text.encode(prompt.rstrip("\ufffd"))), text.encode(written))
    assert "".join(out) == written
    if "\ufffd" not in written:
        assert not any("\ufffd" in piece for piece in out)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, SIZE - 1), max_size=60))
def test_any_ids_at_all_join_to_their_decoding(text: Text, ids: list[int]) -> None:
    assert "".join(pieces(text.stream([]), ids)) == text.decode(ids)


def test_a_character_begun_by_the_prompt_is_finished_by_the_stream(text: Text) -> None:
    ids = text.encode("中")
    assert len(ids) == 3
    assert "".join(pieces(text.stream(ids[:1]), ids[1:])) == "中"


def test_a_token_costs_the_same_however_long_the_text_and_however_broken() -> None:
    lengths: list[int] = []

    def decode(ids: Sequence[int]) -> str:
        lengths.append(len(ids))
        return "".join("\ufffd" if token else "a" for token in ids)

    out = pieces(Detokenizer(SimpleNamespace(decode=decode), []), [0] * 500 + [1] * 500)
    assert "".join(out) == "a" * 500 + "\ufffd" * 500
    assert max(lengths) <= WINDOW


def test_a_decoder_that_takes_text_back_makes_no_text_twice() -> None:
    """As those that tidy up spaces in front of punctuation do."""
    texts = ["", "ab", "a", "abc"]
    fake = SimpleNamespace(decode=lambda ids: texts[len(ids)])
    assert pieces(Detokenizer(fake, []), [0, 0, 0]) == ["ab", "", "c", ""]


@pytest.fixture(scope="module")
def metaspace(tmp_path_factory: pytest.TempPathFactory) -> Text:
    """A sentencepiece-like tokenizer: spaces are ▁, a first token's is dropped, unknown bytes fall back."""
    words = ["▁the", "▁fox", "s", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="s"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    folder = tmp_path_factory.mktemp("metaspace")
    tokenizer.save(str(folder / "tokenizer.json"))
    return Text(folder, None)


def test_spaces_between_tokens_survive_streaming(metaspace: Text) -> None:
    assert pieces(metaspace.stream([0]), [1, 2, 0]) == [" fox", "s", " the", ""]
    assert pieces(metaspace.stream([]), [0, 1]) == ["the", " fox", ""]


def test_byte_fallback_characters_come_whole(metaspace: Text) -> None:
    ids = [3 + byte for byte in "😀".encode()]
    assert pieces(metaspace.stream([0]), ids) == ["", "", "", "😀", ""]


def test_special_tokens_are_not_text_but_are_read_in_chats(text: Text) -> None:
    ids = text.encode_chat([{"role": "user", "content": "fox"}])
    assert ids[-1] == SIZE - 1
    assert text.decode(ids) == "fox"


def test_raw_text_gets_the_tokenizers_bos_and_chats_only_their_templates(
    make_tokenizer: Callable[[int], Tokenizer], tmp_path: Path
) -> None:
    tokenizer = make_tokenizer(SIZE)
    bos = ("<|end|>", SIZE - 3)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    text = Text(tmp_path, "<|end|>{{ messages[0].content }}")
    assert text.encode("fox") == text.encode_chat([{"content": "fox"}])
    assert text.encode("fox").count(bos[1]) == 1


def test_templates_have_what_transformers_gives_them(folder: Path) -> None:
    template = (
        "{%- for m in messages %}\n"
        "    {%- if m.skip %}{% continue %}{% endif %}\n"
        "{{ m | tojson }}{{ strftime_now('%Y')[:2] }}\n"
        "{%- endfor %}\n"
        "{% if tools is none and add_generation_prompt %}!{% endif %}"
    )
    rendered = Text(folder, template).render([{"content": "é<"}, {"skip": True}])
    assert rendered == '{"content": "é<"}20!'


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages.append(1) }}", "is not safely callable|unsafe"),
        ("{% if %}", "is broken: line 1"),
        ("{{ 1 / 0 }}", "division by zero"),
    ],
)
def test_a_template_that_refuses_is_bad_input(folder: Path, template: str, problem: str) -> None:
    with pytest.raises(BadInput, match=problem):
        Text(folder, template).render([])


def test_no_template_is_bad_input(metaspace: Text) -> None:
    with pytest.raises(BadInput, match="this model has no chat template"):
        metaspace.render([])


def test_a_tokenizer_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(BadArtifact, match=r"tokenizer\.json cannot be read"):
        Text(tmp_path, None)


@pytest.mark.parametrize("config", [b"[]", b"\xff", b""])
def test_a_tokenizer_config_that_cannot_be_read(folder: Path, config: bytes, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_bytes(config)
    with pytest.raises(BadArtifact, match=r"tokenizer_config\.json: "):
        Text(tmp_path, None)


def test_truncation_of_the_tokenizer_file_is_not_the_runtimes(
    make_tokenizer: Callable[[int], Tokenizer], tmp_path: Path
) -> None:
    tokenizer = make_tokenizer(SIZE)
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=64)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert 3 < len(Text(tmp_path, None).encode("zzzzzz")) < 64


def test_the_first_difference_of_vocabularies() -> None:
    assert first_difference({"a": 0, "b": 1}, {"b": 1, "a": 0}) is None
    assert first_difference({"a": 0, "b": 1, "c": 2}, {"a": 0, "x": 1, "y": 2}) == (1, "b", "x")
    assert first_difference({"a": 0}, {"a": 0, "b": 1}) == (1, None, "b")
