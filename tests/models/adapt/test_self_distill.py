"""Self-distillation by a scripted writer: what is asked, what is kept, and how an interrupted run goes on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tiny import CHAT_TEMPLATE, write

from pard_onnx.models.adapt.documents import Document, document_of
from pard_onnx.models.adapt.samples import Counts
from pard_onnx.models.adapt.self_distill import Distiller, Ends, Reply, first_question
from pard_onnx.models.errors import BadInput, TooLong
from pard_onnx.runtime.text.tokenizer import Text

END, TEXT_END = 299, 297
DOCUMENTS = [
    document_of({"conversation": [{"human": "a", "assistant": "x"}, {"human": "b", "assistant": "y"}]}, "line 1"),
    document_of({"prompt": "c"}, "line 2"),
    document_of({"text": "hello"}, "line 3"),
    document_of({"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "d"}]}, "line 4"),
]


class Writer:
    """Writes a text that tells of the seed; notes what it was asked."""

    def __init__(self, text: Text) -> None:
        self.text = text
        self.asked: list[str] = []
        self.is_whole = True

    def __call__(self, ids: Sequence[int], seed: int) -> Reply:
        self.asked.append(self.text.decode(ids, skip_special_tokens=False))
        reply = f"r{seed}"
        return Reply(self.text.encode(reply), reply, self.is_whole)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Text:
    return Text(write(tmp_path_factory.mktemp("model")), CHAT_TEMPLATE)


def distiller(text: Text, file: Path) -> tuple[Distiller, Writer]:
    writer = Writer(text)
    return Distiller(text, writer, file, 5, Ends(END, TEXT_END)), writer


def shown(distiller: Distiller, text: Text, longest: int = 999) -> list[tuple[int, str, str]]:
    """The document, the text of each sample, and its replies."""
    return [
        (
            number,
            text.decode(sample.ids.tolist(), skip_special_tokens=False),
            text.decode(sample.ids[sample.replies].tolist(), skip_special_tokens=False),
        )
        for number, sample in distiller.samples(longest, Counts())
    ]


def test_each_reply_is_written_after_the_targets_own_ones(text: Text, tmp_path: Path) -> None:
    found, writer = distiller(text, tmp_path / "replies.jsonl")
    found.run(DOCUMENTS)
    user, reply = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n", "{}<|im_end|>\n"
    first = user.format("a")
    second = first + reply.format("r6") + user.format("b")
    system = "<|im_start|>system\ns<|im_end|>\n"
    assert writer.asked == [first, second, user.format("c"), "hello", system + user.format("d")]
    assert shown(found, text) == [
        (0, second + "r8<|im_end|>", "r6<|im_end|>r8<|im_end|>"),
        (1, user.format("c") + "r1006<|im_end|>", "r1006<|im_end|>"),
        (2, "hellor2005<|endoftext|>", "r2005<|endoftext|>"),
        (3, system + user.format("d") + "r3007<|im_end|>", "r3007<|im_end|>"),
    ]
    kept = [json.loads(line) for line in (tmp_path / "replies.jsonl").read_text().splitlines()]
    assert kept[0]["messages"][3] == {"role": "assistant", "content": "r8"}


def test_a_reply_without_its_end_ends_the_conversation(text: Text, tmp_path: Path) -> None:
    found, writer = distiller(text, tmp_path / "replies.jsonl")
    writer.is_whole = False
    found.run(DOCUMENTS[:1])
    assert len(writer.asked) == 1 and [replies for *_, replies in shown(found, text)] == ["r6"]


def test_a_run_that_was_killed_at_any_byte_goes_on(text: Text, tmp_path: Path) -> None:
    whole, _ = distiller(text, tmp_path / "whole.jsonl")
    whole.run(DOCUMENTS)
    content = (tmp_path / "whole.jsonl").read_bytes()
    file = tmp_path / "again.jsonl"
    for end in range(0, len(content), 7):
        file.write_bytes(content[:end])
        again, writer = distiller(text, file)
        again.run(DOCUMENTS)
        assert file.read_bytes() == content
        done = content[:end].count(b"\n")
        assert len(writer.asked) == (0 if done == 4 else 5 if done == 0 else 4 - done)


def test_calls_of_tools_stay_and_a_prompt_without_room_gives_nothing(text: Text, tmp_path: Path) -> None:
    call = {"role": "assistant", "content": "call", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    messages = ({"role": "user", "content": "a"}, call, {"role": "tool", "content": "1"})
    found, writer = distiller(text, tmp_path / "replies.jsonl")
    found.run([Document("line 1", messages)])
    assert len(writer.asked) == 1 and "call<|im_end|>" in writer.asked[0]

    def full(ids: Sequence[int], seed: int) -> Reply:
        raise TooLong("too long")

    none = Distiller(text, full, tmp_path / "none.jsonl", 0, Ends(END, None))
    none.run(DOCUMENTS)
    counts = Counts()
    assert list(none.samples(99, counts)) == [] and counts.unused == counts.documents == 4


def test_samples_are_cut(text: Text, tmp_path: Path) -> None:
    found, _ = distiller(text, tmp_path / "replies.jsonl")
    found.run(DOCUMENTS[2:3])
    counts = Counts()
    ((_, sample),) = found.samples(6, counts)
    assert len(sample.ids) == 6 and counts.cut == 1


def test_errors_name_the_document(text: Text, tmp_path: Path) -> None:
    found, _ = distiller(text, tmp_path / "replies.jsonl")
    found.arguments = {"messages": 1}
    with pytest.raises(BadInput, match=r"^line 1: template_arguments have messages"):
        found.run(DOCUMENTS[:1])


@pytest.mark.parametrize(
    ("value", "count"),
    [
        ({"messages": []}, 0),
        ({"text": " \n"}, 0),
        ({"messages": [{"role": "assistant", "content": "a"}]}, 0),
        ({"prompt": "a"}, 1),
        ({"conversation": [{"human": "a", "assistant": "b"}, {"human": "c", "assistant": "d"}]}, 1),
        ({"messages": [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]}, 2),
    ],
)
def test_the_first_question_is_what_the_target_is_asked_first(
    text: Text, tmp_path: Path, value: Any, count: int
) -> None:
    """A document without one has no reply, and stops nothing."""
    document = document_of(value, "line 1")
    messages = first_question(document)
    found, writer = distiller(text, tmp_path / "replies.jsonl")
    found.run([document])
    counts = Counts()
    assert len(messages) == count and bool(count) == bool(list(found.samples(999, counts)))
    assert counts.unused == (not count)
    prompt = text.render(messages, {"add_generation_prompt": True}) if messages else None
    assert writer.asked[:1] == ([prompt] if messages else [])
