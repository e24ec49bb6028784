"""A real GGUF file, SmolLM2-135M-Instruct: llama.cpp's token ids; transformers' weights, logits and greedy texts."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from real import smollm2_gguf, smollm2_in_transformers

from pard_onnx import load
from pard_onnx.export.verify.drive import drive
from pard_onnx.export_command import main
from pard_onnx.models.checkpoints.checkpoint import Checkpoint, read_tensor
from pard_onnx.models.checkpoints.vocabulary import load_tokenizer
from pard_onnx.models.manifest import Manifest

pytestmark = pytest.mark.real
PROMPTS = {
    "code": "def fibonacci(n):\n    ",
    "more code": "import json\n\nclass Cache:\n    def __init__(self, size):\n",
    "sql": "SELECT name, COUNT(*) FROM users WHERE age > 30 GROUP BY",
    "mathematics": "The derivative of x^3 + 2x^2 - 5 is",
    "digits": "3.14159265358979 and 2.71828 add up to",
    "prose": "It was a dark and stormy night, and the",
    "list": "Three things to pack for a trip:\n1.",
    "French": "La capitale de la France est",
    "German": "Der schnelle braune Fuchs springt über",
    "Chinese": "今天天气很好，我们",
    "Russian": "Москва - столица",
    "emoji": "I love pizza 🍕 and ice cream 🍦 because",
    "chat": "<|im_start|>user\nWhat is the capital of Italy?<|im_end|>\n<|im_start|>assistant\n",
}
PIECES = [
    *"abcXYZ 0123456789\n\t'\"()[]{}.,;:!?-_=+*/\\<>|#@$%^&~`",
    *(
        "  ",
        "\n\n",
        "\r\n",
        "é",
        "ß",
        "你",
        "日本",
        "한국",
        "ا",
        "م",
        "हि",
        "न्",
        "😀",
        "👨‍👩‍👧",
        "🇩🇪",
        "\u200b",
        "\u00a0",
    ),
    *("'s", "'T", "'re", "½", "²", "٣", "e\u0301", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<repo_name>"),
]


@pytest.fixture(scope="module")
def path() -> Path:
    return smollm2_gguf()


@pytest.fixture(scope="module")
def llama(path: Path) -> Iterator[Any]:
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    model = llama_cpp.Llama(str(path), n_ctx=256, n_threads=2, logits_all=True, verbose=False)
    yield model
    model.close()


@pytest.fixture(scope="module")
def model() -> Any:
    """transformers' own reading of the file."""
    return smollm2_in_transformers()


@pytest.fixture(scope="module")
def artifact(path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("real") / "fp32"
    options = ["--precision", "fp32", "--context-length", "512", "--no-verify"]
    assert main(["--model", str(path), "--output", str(out), *options]) == 0
    return out


def texts() -> list[str]:
    rng = random.Random(0)
    found = ["", *PROMPTS.values(), Path(__file__).read_text(encoding="utf-8")]
    found += ["".join(rng.choices(PIECES, k=rng.randint(1, 60))) for _ in range(2000)]
    planes = ((1, 0x2FF), (0x300, 0xD7FF), (0xE000, 0x1FFFF))
    return found + [
        "".join(chr(rng.randint(*rng.choice(planes))) for _ in range(rng.randint(1, 20))) for _ in range(1000)
    ]


def test_weights_are_transformers(path: Path, model: Any) -> None:
    state, found = model.state_dict(), Checkpoint.open(path).in_floats()
    for name, tensor in found.tensors.items():
        np.testing.assert_array_equal(read_tensor(tensor), state[name].numpy(), err_msg=name)


def test_token_ids_are_those_of_llama_cpp(path: Path, llama: Any) -> None:
    import llama_cpp

    found = Checkpoint.open(path)
    tokenizer = load_tokenizer(found.folder / "tokenizer.json")
    for text in texts():
        expected = llama.tokenize(text.encode(), add_bos=True, special=True)
        assert expected == tokenizer.encode(text).ids, text
        assert llama.detokenize(expected, special=True).decode(errors="replace") == tokenizer.decode(
            expected, skip_special_tokens=False
        )
    vocabulary = llama_cpp.llama_model_get_vocab(llama.model)
    ends = [i for i in range(llama.n_vocab()) if llama_cpp.llama_vocab_is_eog(vocabulary, i)]
    assert ends == sorted(found.spec.vocabulary.eos_ids)


def test_greedy_texts_are_transformers(artifact: Path, model: Any) -> None:
    tokenizer = load_tokenizer(artifact / "tokenizer.json")
    ends = list(Manifest.read(artifact).spec.vocabulary.eos_ids)
    with load(artifact) as pair:
        for name, prompt in PROMPTS.items():
            ids = tokenizer.encode(prompt, add_special_tokens=False).ids
            options: dict[str, Any] = {
                "do_sample": False,
                "max_new_tokens": 32,
                "eos_token_id": ends,
                "pad_token_id": 0,
            }
            with torch.inference_mode():
                text = model.generate(torch.tensor([ids]), **options)[0, len(ids) :].tolist()
            wanted = [token for token in text if token not in ends]
            assert wanted == list(pair.generate(prompt, max_new_tokens=32).tokens), name


def test_logits_are_close(artifact: Path, model: Any, llama: Any) -> None:
    tokenizer = load_tokenizer(artifact / "tokenizer.json")
    manifest = Manifest.read(artifact)
    for prompt in PROMPTS.values():
        ids = tokenizer.encode(prompt).ids
        found = drive(artifact, manifest).step(np.array(ids))
        with torch.inference_mode():
            wanted = model(torch.tensor([ids])).logits[0].numpy()
        np.testing.assert_allclose(found, wanted, atol=2e-3)
        llama.reset()
        llama.eval(ids)
        theirs = llama.scores[: len(ids)]  # llama.cpp rounds activations to 8 bits beside quantized weights
        assert np.abs(found - theirs).mean() < 0.1 * found.std()
