"""Starting models and mask tokens: the models are compared with transformers' own loading."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf_files
import pytest
import quantized
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import ARCHITECTURES, edit_json, make_pard2, write
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from pard_onnx.models.adapt.draft_folder import write_draft
from pard_onnx.models.adapt.mask_token import SPARE
from pard_onnx.models.adapt.start import CHOICES, Start, chosen_layers, mask_of, shallow, start_from, trainable
from pard_onnx.models.checkpoints.checkpoint import Checkpoint
from pard_onnx.models.errors import BadCheckpoint, BadInput

IDS = torch.arange(20)[None]
MASK = 300  # the first padding row of the tiny models


def logits(model: Any) -> torch.Tensor:
    """Without the mask's column, which a tied head changes."""
    with torch.inference_mode():
        found: torch.Tensor = model.eval()(IDS, use_cache=False).logits
    return found[..., :MASK]


def reference(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_a_start_computes_what_its_layers_compute_in_transformers(family: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "model", family, layers=5, tied=family in ("qwen2", "gemma3_text"), dtype="bfloat16")
    kept = reference(folder)
    assert torch.equal(logits(start_from(folder).model), logits(kept))
    start = shallow(folder, 3, "even")
    kept.model.layers = torch.nn.ModuleList([kept.model.layers[index] for index in (0, 2, 4)])
    if family == "gemma3_text":  # whose kinds of layers stand in the config
        kept.config.layer_types = [kept.config.layer_types[index] for index in (0, 2, 4)]
    kept.config.num_hidden_layers = 3
    assert torch.equal(logits(start.model), logits(kept))
    assert start.note == "layers 0, 2, 4 of the 5 of model"


@given(st.integers(1, 80).flatmap(lambda total: st.tuples(st.just(total), st.integers(1, total))))
def test_chosen_layers_are_distinct_and_in_order(numbers: tuple[int, int]) -> None:
    total, count = numbers
    for choose in CHOICES:
        found = chosen_layers(total, count, choose)
        assert found == sorted(set(found)) and len(found) == count and set(found) <= set(range(total))
    even = chosen_layers(total, count, "even")
    assert even[0] == 0 and (count == 1 or even[-1] == total - 1)
    steps = {b - a for a, b in pairwise(even)}
    assert not steps or max(steps) - min(steps) <= 1


@pytest.mark.parametrize("layers", [0, 3, -1])
def test_more_layers_than_there_are(layers: int, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=f"--shallow {layers}: the target has 2 layers; take from 1 to 2 of them"):
        shallow(write(tmp_path / "model"), layers)


def test_the_mask_is_the_first_row_past_the_tokenizer(tmp_path: Path) -> None:
    start = start_from(write(tmp_path / "model"))
    assert start.mask_id == MASK
    weight = start.model.get_input_embeddings().weight
    assert torch.allclose(weight[MASK], weight[:MASK].mean(0), atol=1e-6)


@pytest.mark.parametrize("tied", [False, True])
def test_rows_are_added_where_no_id_is_free(tied: bool, tmp_path: Path) -> None:
    folder = write(tmp_path / "model", vocab_rows=300, tied=tied)
    start = start_from(folder)
    assert (start.mask_id, start.model.config.vocab_size) == (300, 320)  # the next multiple of 64
    assert start.model.get_input_embeddings().weight.shape[0] == start.model.get_output_embeddings().weight.shape[0]
    for module in (start.model.get_input_embeddings(), start.model.get_output_embeddings()):
        assert torch.allclose(module.weight[300:], module.weight[:300].mean(0).expand(20, -1), atol=1e-6)
    assert torch.equal(logits(start.model), logits(reference(folder)))
    write_draft(start, tmp_path / "draft")
    spec = Checkpoint.open(tmp_path / "draft").spec
    assert (spec.vocabulary.rows, spec.vocabulary.size) == (320, 300), "ids past the tokenizer are not reachable"


def with_tokens(folder: Path, *texts: str) -> Path:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens(list(texts))
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize(
    "text", ["<|reserved_special_token_7|>", "<unused7>", "[control_7]", "<SPECIAL_7>", "<|dummy_7|>", "<extra_id_7>"]
)
def test_a_reserved_token_is_found_where_no_row_is_free(text: str, tmp_path: Path) -> None:
    folder = with_tokens(write(tmp_path / "model", vocab_rows=303), "<|tool|>", text, "<|another|>")
    found = mask_of(trainable(folder))
    assert (found.id, found.rows, found.note) == (301, 303, f"the unused token {text}")


@pytest.mark.parametrize("text", ["<|im_start|>", "<think>", "<|vision_start|>", "<|tool_2|>", "<pad>", "<|eot_id|>"])
def test_tokens_of_other_names_are_used(text: str) -> None:
    assert not SPARE.fullmatch(text)


def test_a_reserved_token_that_the_model_uses_is_none(tmp_path: Path) -> None:
    folder = with_tokens(write(tmp_path / "model", vocab_rows=302), "<unused1>", "<unused2>")
    edit_json(folder / "tokenizer_config.json", pad_token="<unused2>")
    assert mask_of(trainable(folder)).id == 300
    edit_json(folder / "tokenizer_config.json", chat_template="{{ '<unused1>' }}")
    assert mask_of(trainable(folder)).note.startswith("a new row")


@pytest.mark.parametrize(
    ("given_id", "problem"),
    [
        (5, "which texts have"),
        (299, "which the model uses"),
        (298, "which texts have"),  # <|im_start|> of the chat template
        (-1, "the draft has ids 0 to 319"),
        (320, "the draft has ids 0 to 319"),
    ],
)
def test_an_id_that_is_no_mask(given_id: int, problem: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=rf"--mask-token {given_id}: .*{problem}.*id 300 is free"):
        start_from(write(tmp_path / "model"), given_id)


def test_an_id_that_is_given(tmp_path: Path) -> None:
    assert start_from(write(tmp_path / "model"), 310).mask_id == 310
    draft = write(tmp_path / "draft", role="draft")
    before = reference(draft).get_input_embeddings().weight[MASK]
    again = start_from(draft)
    assert again.mask_id == MASK and torch.equal(again.model.get_input_embeddings().weight[MASK], before)
    assert start_from(draft, 301).mask_id == 301


def test_integers_cannot_be_trained(tmp_path: Path) -> None:
    folder, _ = quantized.write(tmp_path / "model", "awq")
    with pytest.raises(BadCheckpoint, match=r"its weights are integers \(awq\), .*; name the unquantized checkpoint"):
        start_from(folder)


def test_a_gguf_file_is_read_as_floats(tmp_path: Path) -> None:
    folder = write(tmp_path / "model", "llama", layers=3)
    file = tmp_path / "model.gguf"
    floats = gguf_files.write(file, folder, "Q4_0")
    start = shallow(file, 2, "even")
    assert torch.allclose(logits(start.model), logits(shallow(floats, 2, "even").model), atol=1e-5)
    write_draft(start, tmp_path / "draft")
    assert Checkpoint.open(tmp_path / "draft").spec.dtype == "bfloat16"


# The finished folder


def finished(folder: Path, tmp_path: Path) -> Path:
    write_draft(start_from(folder), tmp_path / "draft")
    return tmp_path / "draft"


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_the_finished_folder_is_a_draft(family: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "model", family, dtype="bfloat16")
    found = finished(folder, tmp_path)
    checkpoint = Checkpoint.open(found)
    assert checkpoint.spec.pard is not None and checkpoint.spec.pard.mask_id == MASK
    assert checkpoint.spec.pard.spd_type == "pard" and checkpoint.spec.dtype == "bfloat16"
    model = AutoModelForCausalLM.from_pretrained(found, dtype=torch.float32)
    assert torch.equal(logits(model), logits(reference(folder)))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (found / name).read_bytes() == (folder / name).read_bytes()


def test_other_names_of_the_mask_are_removed(tmp_path: Path) -> None:
    folder = write(tmp_path / "model")
    edit_json(folder / "config.json", mask_token_id=310)
    write_draft(start_from(folder, 301), tmp_path / "draft")
    config = json.loads((tmp_path / "draft" / "config.json").read_text(encoding="utf-8"))
    assert config["pard_token"] == 301 and "mask_token_id" not in config


def test_a_pard2_draft_that_is_trained_without_its_projection_reads_tokens_alone(tmp_path: Path) -> None:
    folder = make_pard2(write(tmp_path / "model", role="draft"), file="pard_warp_model/model.safetensors")
    write_draft(start_from(folder), tmp_path / "draft")
    spec = Checkpoint.open(tmp_path / "draft").spec
    assert spec.pard is not None and (spec.pard.spd_type, spec.pard.features) == ("pard", None)


def test_a_finished_projection_is_the_drafts(tmp_path: Path) -> None:
    folder = make_pard2(write(tmp_path / "model", role="draft"), file="pard_warp_model/model.safetensors")
    write_draft(start_from(folder), tmp_path / "draft", folder / "pard_warp_model" / "model.safetensors")
    found, wanted = (Checkpoint.open(one).spec.pard for one in (tmp_path / "draft", folder))
    assert found == wanted and found is not None and found.features is not None


def test_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError("disk")

    start: Start = start_from(write(tmp_path / "model"))
    monkeypatch.setattr("pard_onnx.models.adapt.draft_folder.save_file", fail)
    with pytest.raises(OSError, match="disk"):
        write_draft(start, tmp_path / "draft")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
