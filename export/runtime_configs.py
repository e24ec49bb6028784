"""Config files for other runtimes: `genai_config.json` of onnxruntime-genai, `vitisai_config.json` of Ryzen AI."""

from __future__ import annotations

from pathlib import Path

from pard_onnx.models.json_files import write_json
from pard_onnx.models.manifest import GRAPH, VITISAI_CONFIG, Manifest

FILE_NAME = "genai_config.json"


def write_genai_config(manifest: Manifest, folder: Path) -> None:
    """Write genai_config.json of a target (schema: onnxruntime-genai 0.18, decoder-only models).

    `type` is the family's name: its library lists all of ours. Its own builder also writes `sliding_window`, with which
    genai keeps only a window's rows of a layer's KV cache. Without it all caches have their full size, as in this
    package's graphs, and the operator alone leaves out the tokens before the window.
    """
    spec = manifest.spec
    vocabulary = spec.vocabulary
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": GRAPH,
        "head_size": spec.head_dim,
        "hidden_size": spec.hidden,
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
        "num_attention_heads": spec.heads,
        "num_hidden_layers": spec.layers,
        "num_key_value_heads": spec.kv_heads,
    }
    eos = list(vocabulary.eos_ids)
    model = {
        "type": spec.family,
        "decoder": decoder,
        "context_length": manifest.capacity,
        "vocab_size": vocabulary.rows,
        "bos_token_id": vocabulary.bos_id if vocabulary.bos_id is not None else (eos or [0])[0],
        "eos_token_id": eos[0] if len(eos) == 1 else eos,
        "pad_token_id": (eos or [0])[0],
    }
    search = {
        "do_sample": False,
        "max_length": manifest.capacity,
        "min_length": 0,
        "num_beams": 1,
        "num_return_sequences": 1,
        "past_present_share_buffer": True,
        "repetition_penalty": 1.0,
        "temperature": 1.0,
        "top_k": 1,
        "top_p": 1.0,
    }
    write_json(folder / FILE_NAME, {"model": model, "search": search})


# Ryzen AI's documented defaults for float models, which it computes in bfloat16 ("Config File Options").
VITISAI = {
    "passes": [
        {"name": "init", "plugin": "vaip-pass_init"},
        {
            "name": "vaiml_partition",
            "plugin": "vaip-pass_vaiml_partition",
            "vaiml_config": {"optimize_level": 1, "preferred_data_storage": "auto"},
        },
    ],
    "target": "VAIML",
    "targets": [{"name": "VAIML", "pass": ["init", "vaiml_partition"]}],
}


def write_vitisai_config(folder: Path) -> None:
    """Write the settings of the NPU's compiler for graphs in floats."""
    write_json(folder / VITISAI_CONFIG, VITISAI)
