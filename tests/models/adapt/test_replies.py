"""Which tokens of a conversation are replies: by many templates, compared with transformers where it knows them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import CHAT_TEMPLATE, edit_json, write
from transformers import PreTrainedTokenizerFast

from pard_onnx.models.adapt.documents import Document
from pard_onnx.models.adapt.encoding import Encoder
from pard_onnx.models.adapt.replies import marked_texts
from pard_onnx.models.adapt.samples import Sample
from pard_onnx.models.checkpoints.vocabulary import chat_template
from pard_onnx.models.errors import BadInput
from pard_onnx.runtime.text.template import render
from pard_onnx.runtime.text.tokenizer import Text

END = 299  # <|im_end|> of the tiny tokenizer
TAGGED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# The end of a turn is no part of what the template marks
CONTENT_TAGGED = TAGGED.replace(
    "{{ m.content + '<|im_end|>' }}{% endgeneration %}", "{{ m.content }}{% endgeneration %}{{ '<|im_end|>' }}"
)
LLAMA3 = (
    "{% for m in messages %}{{ '[head]' + m.role + '[/head]\n\n' + m.content | trim + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[head]assistant[/head]\n\n' }}{% endif %}"
)
MISTRAL = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content + '<|im_end|>' }}{% endif %}{% endfor %}"
)
# As Qwen3's: thinking in the last reply alone
THINKING = (
    "{% for m in messages %}{% set text = m.content %}"
    "{% if m.role == 'assistant' and not loop.last %}{% set text = text.split('</think>')[-1].lstrip('\n') %}"
    "{% endif %}"
    "{% if m.role == 'assistant' and loop.last and '</think>' not in text %}"
    "{% set text = '<think>\n\n</think>\n\n' + text %}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' + text + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As DeepSeek-R1's: the prompt opens the thinking, which no reply in a conversation has
OPENED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{{ '[A]' + m.content.split('</think>')[-1] + '<|endoftext|>' }}{% else %}{{ '[U]' + m.content }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '[A]<think>\n' }}{% endif %}"
)
GEMMA = (
    "{% for m in messages %}{% set role = 'model' if m.role == 'assistant' else m.role %}"
    "{{ '<|im_start|>' + role + '\n' + m.content | trim + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>model\n' }}{% endif %}"
)
NO_PROMPT = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
TEMPLATES = {
    "chatml": CHAT_TEMPLATE,
    "tagged": TAGGED,
    "llama3": LLAMA3,
    "mistral": MISTRAL,
    "thinking": THINKING,
    "opened": OPENED,
    "gemma": GEMMA,
}
TEXTS = st.text(alphabet="ab \n<>é😀0:", min_size=1, max_size=12).filter(str.strip)
PAIRS = st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=4)


def conversation(pairs: Sequence[tuple[str, str]]) -> tuple[dict[str, Any], ...]:
    turns = [("user", "assistant")] * len(pairs)
    return tuple(
        {"role": role, "content": text}
        for roles, texts in zip(turns, pairs, strict=True)
        for role, text in zip(roles, texts, strict=True)
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("model"), "llama")


def encoder(folder: Path, template: str, longest: int = 4096) -> Encoder:
    return Encoder(Text(folder, template), 300, 320, (297, 299), longest)


def samples(folder: Path, template: str, messages: Sequence[Mapping[str, Any]]) -> list[Sample]:
    return list(encoder(folder, template).samples_of(Document("here", tuple(map(dict, messages)))))


def replies(folder: Path, sample: Sample) -> list[str]:
    """The runs of reply tokens as text."""
    text, out, run = Text(folder, None), [], []
    for id_, is_reply in zip([*sample.ids.tolist(), -1], [*sample.replies.tolist(), False], strict=True):
        if is_reply:
            run.append(id_)
        elif run:
            out.append(text.decode(run, skip_special_tokens=False))
            run = []
    return out


@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=40)
@given(pairs=PAIRS)
def test_each_reply_is_its_content_and_the_end_that_the_model_writes(
    name: str, pairs: list[tuple[str, str]], folder: Path
) -> None:
    template, messages = TEMPLATES[name], conversation(pairs)
    found = [text for sample in samples(folder, template, messages) for text in replies(folder, sample)]
    trimmed = name in ("llama3", "gemma")
    end = "<|endoftext|>" if name == "opened" else "<|im_end|>"
    before = {"thinking": "<think>\n\n</think>\n\n", "mistral": " "}.get(name, "")
    contents = [reply.strip() if trimmed else reply for _, reply in pairs]
    if name == "opened":  # a reply begins with its content, as far as its beginning is written
        assert [text.removesuffix(end).strip() for text in found] == [text.strip() for text in contents]
        assert all(text.endswith(end) for text in found)
    else:
        assert found == [before + text + end for text in contents]


@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=40)
@given(pairs=PAIRS)
def test_a_sample_is_the_prompt_of_each_turn_and_its_reply(
    name: str, pairs: list[tuple[str, str]], folder: Path
) -> None:
    """What stands before a reply is what the runtime reads before it writes one."""
    messages = conversation(pairs)
    template = TEMPLATES[name]
    if name == "opened":
        return
    found = marked_texts(messages, lambda chosen, prompt: render(template, chosen, {"add_generation_prompt": prompt}))
    begins = [one.text[:begin] for one in found for begin, _ in one.replies]
    turns = [messages[: 2 * index + 1] for index in range(len(pairs))]
    prompts = [render(template, turn, {"add_generation_prompt": True}) for turn in turns]
    assert begins == prompts


@pytest.mark.parametrize("template", [TAGGED, CONTENT_TAGGED], ids=["with the end", "without"])
@settings(max_examples=40)
@given(pairs=PAIRS)
def test_templates_that_mark_replies_are_read_as_transformers_reads_them(
    template: str, pairs: list[tuple[str, str]], folder: Path
) -> None:
    reference: Any = PreTrainedTokenizerFast.from_pretrained(folder)
    messages = list(conversation(pairs))
    wanted = reference.apply_chat_template(
        messages, chat_template=template, return_assistant_tokens_mask=True, return_dict=True
    )
    (found,) = samples(folder, template, messages)
    assert found.ids.tolist() == wanted["input_ids"]
    # Of a last character that is several tokens, transformers marks the first one alone.
    marked = [bool(one) for one in wanted["assistant_masks"]]
    others = [at for at, one in enumerate(found.replies.tolist()) if one != marked[at]]
    assert all(found.replies[at] and "\ufffd" in reference.decode([found.ids[at]]) for at in others)


@settings(max_examples=40)
@given(pairs=PAIRS)
def test_the_tokens_are_those_of_transformers(pairs: list[tuple[str, str]], folder: Path) -> None:
    reference: Any = PreTrainedTokenizerFast.from_pretrained(folder)
    messages = list(conversation(pairs))
    for name in ("chatml", "llama3", "mistral", "gemma"):
        (found,) = samples(folder, TEMPLATES[name], messages)
        wanted = reference.apply_chat_template(messages, chat_template=TEMPLATES[name], return_dict=False)
        assert found.ids.tolist() == wanted


def test_a_template_that_does_not_say_where_replies_are_is_refused(folder: Path) -> None:
    messages = conversation([("a", "b")])
    with pytest.raises(BadInput, match=r"here: the chat template does not say where replies .*'assistant: '"):
        samples(folder, NO_PROMPT, messages)
    hidden = OPENED.replace("m.content.split('</think>')[-1]", "m.content | upper")
    with pytest.raises(BadInput, match=r"does not say where replies are: its prompt ends in .*\{% generation %\}"):
        samples(folder, hidden, conversation([("a", "hello")]))


def test_thinking_that_later_turns_leave_out_stays_in_the_sample_of_its_own_turn(folder: Path) -> None:
    messages = conversation([("a", "<think>\nhm\n</think>\n\nyes"), ("b", "no")])
    first, second = samples(folder, THINKING, messages)
    assert replies(folder, first) == ["<think>\nhm\n</think>\n\nyes<|im_end|>"]
    assert replies(folder, second) == ["<think>\n\n</think>\n\nno<|im_end|>"]
    assert "hm" not in Text(folder, None).decode(second.ids.tolist())


def test_what_answers_nothing_is_no_reply(folder: Path) -> None:
    greeting = [{"role": "assistant", "content": "hello"}]
    assert samples(folder, CHAT_TEMPLATE, greeting) == []
    assert samples(folder, CHAT_TEMPLATE, [{"role": "user", "content": "hello"}]) == []
    (found,) = samples(folder, CHAT_TEMPLATE, [*greeting, *conversation([("a", "b")])])
    assert replies(folder, found) == ["b<|im_end|>"]


def test_generation_tags_in_a_template_that_trims_what_it_wrote(folder: Path) -> None:
    """Marks would change such a text, so the prompts say where replies are."""
    trimmed = "{% set all %}" + TAGGED + "{% endset %}{{ all | trim }}"
    (found,) = samples(folder, trimmed, conversation([("a", "b")]))
    assert replies(folder, found) == ["b<|im_end|>"]


def test_a_long_conversation_is_cut_and_a_long_text_becomes_several(folder: Path) -> None:
    whole = encoder(folder, CHAT_TEMPLATE)
    (sample,) = whole.samples_of(Document("here", conversation([("a" * 5, "b" * 40)])))
    cutting = encoder(folder, CHAT_TEMPLATE, longest=30)
    (cut,) = cutting.samples_of(Document("here", conversation([("a" * 5, "b" * 40)])))
    assert cut.ids.tolist() == sample.ids[:30].tolist() and cutting.counts.cut == 1
    parts = list(cutting.samples_of(Document("here", text="xyz " * 40)))
    assert [len(part.ids) for part in parts[:-1]] == [30] * (len(parts) - 1) and all(p.replies.all() for p in parts)
    assert [id_ for part in parts for id_ in part.ids] == Text(folder, None).encode("xyz " * 40)


def test_a_text_with_the_mask_or_a_token_without_a_row_is_refused(folder: Path, tmp_path: Path) -> None:
    masked = Encoder(Text(folder, CHAT_TEMPLATE), END, 320, (299,), 100)
    with pytest.raises(BadInput, match="line 3: it has the token 299, which is the mask"):
        list(masked.samples([Document("line 3", text="a<|im_end|>")]))
    small = Encoder(Text(folder, CHAT_TEMPLATE), 300, 299, (297,), 100)
    with pytest.raises(BadInput, match="line 4: it has the token 299, and the draft has ids 0 to 298"):
        list(small.samples([Document("line 4", text="a<|im_end|>")]))
    edit_json(folder / "tokenizer_config.json")
    assert chat_template(folder) == CHAT_TEMPLATE
