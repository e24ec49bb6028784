"""pard-adapt's data and mask tokens with real tokenizers and chat templates, compared with transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from real import NPM, npm_tokenizer, smollm2_gguf
from transformers import PreTrainedTokenizerFast

from pard_onnx.models.adapt.documents import document_of
from pard_onnx.models.adapt.encoding import Encoder
from pard_onnx.models.adapt.mask_token import Vocabulary, find_mask
from pard_onnx.models.adapt.start import mask_of, shallow, trainable
from pard_onnx.models.checkpoints.added_tokens import read_added_tokens
from pard_onnx.models.checkpoints.vocabulary import chat_template, load_tokenizer
from pard_onnx.models.errors import BadInput
from pard_onnx.runtime.text.tokenizer import Text

pytestmark = pytest.mark.real
ENDS = {"qwen3": "<|im_end|>", "qwen2_5": "<|im_end|>", "llama3_1": "<|eot_id|>"}
ROWS = {"qwen3": 151936, "qwen2_5": 151936, "llama3_1": 128256}
REPLIES = ["2 + 2 = 4.\n\nSo, 4 boxes 😀", "  indented\n", "def f(x):\n    return x\n", "é"]
CHAT = {"conversation": [{"human": f"Question {n}?\n", "assistant": reply} for n, reply in enumerate(REPLIES)]}


@pytest.mark.parametrize("name", NPM)
def test_replies_of_a_conversation(name: str, tmp_path: Path) -> None:
    folder = npm_tokenizer(name, tmp_path)
    reference: Any = PreTrainedTokenizerFast.from_pretrained(folder)
    text = Text(folder, chat_template(folder))
    eos = text.token_id(ENDS[name])
    assert eos is not None
    encoder = Encoder(text, ROWS[name] - 1, ROWS[name], (eos,), 4096)
    document = document_of(CHAT, "here")
    messages = list(document.messages)
    samples = list(encoder.samples_of(document))
    turns = [messages[: 2 * index + 2] for index in range(len(REPLIES))]
    seen = [reference.apply_chat_template(turn, return_dict=False) for turn in turns]
    replies = []
    for sample in samples:
        ids = sample.ids.tolist()
        assert ids in seen
        run: list[int] = []
        for id_, is_reply in zip([*ids, -1], [*sample.replies.tolist(), False], strict=True):
            if is_reply:
                run.append(id_)
            elif run:
                replies.append((ids, text.decode(run, skip_special_tokens=False)))
                run = []
    assert len(replies) == len(REPLIES)
    for number, (ids, found) in enumerate(replies):
        is_last = ids == seen[number]
        content = REPLIES[number].strip() if name == "llama3_1" else REPLIES[number]
        thought = "<think>\n\n</think>\n\n" if name == "qwen3" and is_last else ""
        wanted = content.lstrip("\n") if thought else content
        assert found == f"{thought}{wanted}{ENDS[name]}"


@pytest.mark.parametrize(
    ("name", "mask", "note"),
    [
        ("qwen2_5", 151665, "a row past the tokenizer's ids"),  # that of the published drafts
        ("qwen3", 151669, "a row past the tokenizer's ids"),
        ("llama3_1", 128255, "the unused token <|reserved_special_token_"),
    ],
)
def test_the_mask_of_a_family(name: str, mask: int, note: str, tmp_path: Path) -> None:
    folder = npm_tokenizer(name, tmp_path)
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    tokens = tokenizer.get_vocab(with_added_tokens=True)
    used = {tokens[text] for text in read_added_tokens(folder, BadInput).texts.values() if text in tokens}
    added = tokenizer.get_added_tokens_decoder()
    found = find_mask(Vocabulary(ROWS[name], tokens, added, used, chat_template(folder) or ""))
    assert (found.id, found.rows) == (mask, ROWS[name]) and found.note.startswith(note)


def test_a_shallow_draft_of_a_real_model() -> None:
    mask = mask_of(trainable(smollm2_gguf()))
    assert (mask.id, mask.rows) == (49152, 49216)  # every id has a token, and no row is free
    start = shallow(smollm2_gguf(), 4, "even")
    assert start.note.startswith("layers 0, 10, 19, 29 of the 30 of ")
    embedding = start.model.get_input_embeddings().weight
    assert embedding.shape[0] == 49216 and embedding is start.model.get_output_embeddings().weight


def test_replies_of_smollm2() -> None:
    checkpoint = trainable(smollm2_gguf())
    text = Text(checkpoint.tokenizer_folder, checkpoint.spec.chat_template)
    encoder = Encoder(text, 49152, 49216, checkpoint.spec.vocabulary.eos_ids, 4096)
    (sample,) = encoder.samples_of(document_of(CHAT, "here"))
    found = text.decode(sample.ids[sample.replies].tolist(), skip_special_tokens=False)
    # One token is the line end of the prompt and the first space of a reply; transformers counts such a token, too
    assert found.replace("\n  indented", "  indented") == "".join(f"{reply}<|im_end|>" for reply in REPLIES)
