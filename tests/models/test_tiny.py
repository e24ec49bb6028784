"""The tiny checkpoints are real ones: transformers loads them, and they say what Checkpoint says."""

import json

import numpy as np
import pytest

from pard_onnx.models.checkpoints.checkpoint import Checkpoint, read_tensor


@pytest.mark.parametrize("role", ["target", "draft"])
@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {"rope_theta": 500000.0, "dtype": "float16"}),
        ("qwen2", {"tied": True, "dtype": "bfloat16", "shards": 3}),
        ("qwen3", {"eos": [299, 297]}),
        ("mistral", {}),
        ("smollm3", {"tied": True}),
        ("gemma3_text", {"tied": True, "dtype": "bfloat16"}),
    ],
)
def test_transformers_loads_it(tiny, tmp_path, family, role, options):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folder = tiny(tmp_path, family, role, **options)
    checkpoint = Checkpoint.open(folder)

    model, report = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert getattr(torch, checkpoint.spec.dtype) == model.dtype
    rope = model.config.rope_parameters
    assert rope.get("full_attention", rope)["rope_theta"] == checkpoint.spec.rope.theta
    assert checkpoint.spec.role == role
    loaded = {name: tensor.float().numpy() for name, tensor in model.state_dict().items()}
    for name, entry in checkpoint.tensors.items():
        np.testing.assert_array_equal(read_tensor(entry), loaded[name])

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == checkpoint.spec.vocabulary.size
    assert tokenizer.decode(tokenizer("the lazy dog — né").input_ids) == "the lazy dog — né"
    text = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert text == "<|im_start|>user\nhi<|im_end|>\n"
    assert tokenizer.chat_template == checkpoint.spec.chat_template

    ids = torch.tensor([tokenizer("for value in range").input_ids])
    logits = model(ids).logits[0, -1].float()
    assert logits.std() > 0.3
    eos = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    assert model.generation_config.eos_token_id == eos
