"""Ids that one file of a checkpoint knows and another does not, from export to text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import tiny
from tiny import edit_json

from pard_onnx import BadInput, Options, Pair, load
from pard_onnx.export_command import main

EOT, PAD = 300, 301  # an id of tokenizer_config.json alone; one that was added without a row for it


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    root = tmp_path_factory.mktemp("ids")
    folder = tiny.write(root / "model", "llama", vocab_rows=301, eos=[EOT])
    added = {str(EOT): {"content": "<|eot|>", "special": True}}
    edit_json(folder / "tokenizer_config.json", added_tokens_decoder=added, pad_token="<|pad|>")
    arguments = ["--model", str(folder), "--precision", "fp32", "--no-verify", "--output", str(root / "out")]
    assert main(arguments) == 0
    with load(root / "out", threads=1) as opened:
        yield opened


def test_an_end_that_only_the_config_knows_ends_a_text(pair: Pair) -> None:
    assert len(pair.generate("the", max_new_tokens=6, logit_bias={EOT: float("-inf")}).tokens) == 6
    result = pair.generate("the", max_new_tokens=6, logit_bias={EOT: 1000.0})
    assert (result.tokens, result.finish_reason) == ((), "stop")


def test_such_tokens_are_one_token_in_prompts(pair: Pair) -> None:
    assert pair.encode("the<|eot|>the").count(EOT) == 1
    assert pair.encode([EOT]) == [EOT]


def test_a_token_without_a_row_is_refused_by_name(pair: Pair) -> None:
    with pytest.raises(BadInput, match=r"the token '<\|pad\|>' \(id 301\), but the model has ids 0 to 300"):
        pair.generate("the<|pad|>")
    with pytest.raises(BadInput, match=r"the token '<\|pad\|>' \(id 301\)"):
        pair.generate([{"role": "user", "content": "the<|pad|>"}], special_tokens="encode")
    with pytest.raises(BadInput, match="token id 301 in the prompt; the model has ids 0 to 300"):
        pair.generate([1, PAD])
    for option in ({"stop_token_ids": PAD}, {"logit_bias": {PAD: 1.0}}):
        given: Any = option
        with pytest.raises(BadInput, match="id 301 does not exist"):
            pair.stream("the", **given)


@pytest.mark.parametrize("ids", [[-1], [1, 301], [10**9]])
def test_the_engine_refuses_ids_too(pair: Pair, ids: list[int]) -> None:
    sequence = pair.engine.new_sequence()
    sequence.tokens = list(ids)
    with pytest.raises(BadInput, match=f"token id {ids[-1]} in the prompt"):
        next(pair.engine.run(sequence, Options(max_new_tokens=2)))


def test_an_export_keeps_the_files(pair: Pair) -> None:
    assert {"tokenizer_config.json", "generation_config.json"} <= {file.name for file in pair.target_manifest.files}
