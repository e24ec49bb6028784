"""Embeddings: the mean of transformers' hidden states, in the library and by OpenAI's and Ollama's clients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("starlette")
openai = pytest.importorskip("openai", reason="the package openai is not installed; the extra dev has it")
ollama = pytest.importorskip("ollama", reason="the package ollama is not installed; the extra dev has it")

from numpy.typing import NDArray  # noqa: E402

from pard_onnx import BadInput, Pair, TooLong, load  # noqa: E402
from pard_onnx.export_command import main as export  # noqa: E402
from pard_onnx.serve.sources import named_source  # noqa: E402

TEXTS = ["the quick brown fox", "def self: return self", "fox"]
CAPACITY = 600


@pytest.fixture(scope="module")
def checkpoint(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(tmp_path_factory.mktemp("embedding") / "model", "qwen3", "target", layers=2, max_positions=1024)


@pytest.fixture(scope="module")
def folder(checkpoint: Path) -> Path:
    out = checkpoint.with_name("exported")
    options = ["--precision", "fp32", "--features=-2,-1", "--context-length", str(CAPACITY), "--output", str(out)]
    assert export(["--model", str(checkpoint), *options]) == 0
    return out


@pytest.fixture(scope="module")
def pair(folder: Path) -> Iterator[Pair]:
    with load(folder, threads=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Any]:
    pytest.importorskip("uvicorn")
    from served import served

    with served(named_source(str(folder), None, "tiny"), max_queue=8) as running:
        yield running


def reference(checkpoint: Path, ids: list[int], pooling: str) -> NDArray[np.float32]:
    import torch
    from transformers import AutoModel

    model = AutoModel.from_pretrained(checkpoint, dtype=torch.float32)
    with torch.inference_mode():
        states = model(torch.tensor([ids])).last_hidden_state[0].numpy()
    pooled = states.mean(0) if pooling == "mean" else states[-1]
    return np.asarray(pooled / np.linalg.norm(pooled))


@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("length", [1, 7, 300, CAPACITY])
def test_vectors_are_those_of_transformers(checkpoint: Path, pair: Pair, length: int, pooling: Any) -> None:
    """Also of texts that take several chunks, and up to the capacity."""
    ids = np.random.default_rng(length).integers(1, 250, length).tolist()
    found = pair.embed(ids, pooling=pooling)
    assert found.dtype == np.float32 and abs(np.linalg.norm(found) - 1) < 1e-6
    np.testing.assert_allclose(found, reference(checkpoint, ids, pooling), atol=1e-4)


def test_several_texts_are_what_each_is_alone(pair: Pair) -> None:
    alone = [pair.embed(text) for text in TEXTS]
    np.testing.assert_array_equal(pair.embed(TEXTS), alone)
    np.testing.assert_array_equal(pair.embed([pair.tokenize(text) for text in TEXTS]), alone)
    before = pair.generate("the quick", max_new_tokens=5).tokens
    pair.embed(TEXTS[0])
    assert pair.generate("the quick", max_new_tokens=5).tokens == before


@pytest.mark.parametrize(
    ("text", "options", "problem"),
    [
        (5, {}, "what is embedded is a text"),
        ({"a": 1}, {}, "what is embedded is a text"),
        ([], {}, "not an empty list"),
        ("", {}, "not an empty one"),
        ([[]], {}, r"text\[0\]: .* not an empty one"),
        (["a", 5], {}, r"text\[1\]: what is embedded is a text"),
        ([1, "a"], {}, "'a' is none of these"),
        ([10**6], {}, "token id 1000000 in the text"),
        ("a", {"pooling": "max"}, "pooling must be one of mean, last, not 'max'"),
    ],
)
def test_bad_input_is_named(pair: Pair, text: Any, options: Any, problem: str) -> None:
    with pytest.raises(BadInput, match=problem):
        pair.embed(text, **options)


def test_a_text_that_is_too_long(pair: Pair) -> None:
    with pytest.raises(
        TooLong, match=rf"text\[1\]: the text has {CAPACITY + 1} tokens, but the capacity is {CAPACITY}"
    ):
        pair.embed([[1], [1] * (CAPACITY + 1)])


@pytest.fixture
def client(server: Any) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as opened:
        yield opened


def test_the_client_of_openai(client: Any, pair: Pair) -> None:
    wanted = pair.embed(TEXTS)
    for options in ({}, {"encoding_format": "float"}):  # the client asks for base64 by default
        found = client.embeddings.create(model="tiny", input=TEXTS, **options)
        np.testing.assert_allclose([one.embedding for one in found.data], wanted, atol=1e-6)
        assert [one.index for one in found.data] == [0, 1, 2] and found.model == "tiny"
        assert found.usage.prompt_tokens == sum(len(pair.tokenize(text)) for text in TEXTS)
    for one in (TEXTS[0], pair.tokenize(TEXTS[0]), [pair.tokenize(TEXTS[0])]):
        (found,) = client.embeddings.create(model="tiny", input=one).data
        np.testing.assert_allclose(found.embedding, wanted[0], atol=1e-6)
    last = client.embeddings.create(model="tiny", input="fox", extra_body={"pooling": "last"}).data[0]
    np.testing.assert_allclose(last.embedding, pair.embed("fox", pooling="last"), atol=1e-6)


def test_the_client_of_ollama(server: Any, pair: Pair) -> None:
    with closing(ollama.Client(server.url)) as client:
        check_ollama(client, pair)


def check_ollama(client: Any, pair: Pair) -> None:
    found = client.embed("tiny", TEXTS)
    np.testing.assert_allclose(found.embeddings, pair.embed(TEXTS), atol=1e-6)
    assert found.prompt_eval_count == sum(len(pair.tokenize(text)) for text in TEXTS)
    np.testing.assert_allclose(client.embeddings("tiny", "fox").embedding, pair.embed("fox"), atol=1e-6)
    long = "fox " * 2 * CAPACITY
    assert client.embed("tiny", long).prompt_eval_count == CAPACITY  # cut, as Ollama has it
    with pytest.raises(ollama.ResponseError, match="capacity") as refused:
        client.embed("tiny", long, truncate=False)
    assert refused.value.status_code == 400


@pytest.mark.parametrize(
    ("fields", "param", "problem"),
    [
        ({}, "input", "give a text"),
        ({"input": []}, "input", "give a text"),
        ({"input": {"a": 1}}, "input", "give a text"),
        ({"input": ["a", None]}, "input", r"input[1] is none of these"),
        ({"input": ["a"] * 3000}, "input", "has 3000 texts; send at most 2048"),
        ({"input": ""}, "input", "not an empty one"),
        ({"input": ["a", ""]}, "input", "input[1]: "),
        ({"input": [[10**6]]}, "input", "token id 1000000"),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format", "'float' or 'base64'"),
        ({"input": "a", "dimensions": 5}, "dimensions", "of this model have"),
        ({"input": "a", "pooling": "max"}, "pooling", "'mean' or 'last'"),
        ({"input": "fox " * 2 * CAPACITY}, "input", "capacity"),
    ],
)
def test_bad_requests(server: Any, fields: Any, param: str, problem: str) -> None:
    answer = server.post("/v1/embeddings", {"model": "tiny", **fields})
    error = answer.json()["error"]
    assert problem in error["message"] and error["param"] == param
