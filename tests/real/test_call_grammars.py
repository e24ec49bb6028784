"""Grammars of calls on real tokenizers: whatever they allow is read as calls of the tools, by their schemas."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from real import npm_tokenizer

from pard_onnx.runtime.guided.calls import call_grammar
from pard_onnx.runtime.guided.matcher import Grammars
from pard_onnx.runtime.text.reasoning import THINKING_FORMS
from pard_onnx.runtime.text.reply import ReplyForm
from pard_onnx.runtime.text.tokenizer import Text
from pard_onnx.runtime.text.tool_formats import TOOL_FORMATS, ToolFormat
from pard_onnx.runtime.text.tools import ToolUse, schema_parameters
from pard_onnx.runtime.text.writer import Writer, stop_strings

pytestmark = pytest.mark.real
pytest.importorskip("llguidance")
NAMES = ("qwen3", "llama3_1")
PARAMETERS = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 6, "description": 'a "city"'},
        "unit": {"enum": ["°C", "\\K"]},
        "days": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 30}, "maxItems": 2},
        "exact": {"type": "boolean", "nullable": True},
    },
    "required": ["city", "unit"],
}
TOOLS = tuple(
    {"type": "function", "function": {"name": name, "parameters": parameters}}
    for name, parameters in (("get_weather", PARAMETERS), ("stop", {"type": "object", "properties": {}}))
)


@pytest.fixture(scope="module", params=NAMES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Text, Grammars, int, int]:
    folder: Path = npm_tokenizer(request.param, tmp_path_factory.mktemp(request.param))
    text = Text(folder, None)
    size = max(text.vocabulary().values()) + 1
    eos = text.token_id({"qwen3": "<|im_end|>", "llama3_1": "<|eot_id|>"}[request.param])
    assert eos is not None
    return text, Grammars(text.tokenizer_json, request.param, size, [eos]), size, eos


@pytest.mark.parametrize("form", TOOL_FORMATS, ids=lambda form: form.name)
@pytest.mark.parametrize("thinks", [False, True])
def test_what_the_grammar_allows_are_calls(
    model: tuple[Text, Grammars, int, int], form: ToolFormat, thinks: bool
) -> None:
    text, grammars, size, eos = model
    use = ToolUse(TOOLS, TOOLS, several=True)
    grammar = call_grammar(form, use, text.token_id)
    thinking = THINKING_FORMS[0] if thinks else None
    if thinking:
        grammar = grammar.after(thinking.end, False, thinking.begin)
    reply = ReplyForm(thinking, False, use, form, use.parameters({}))
    stops = stop_strings((), text.special_ids(), reply.tags)
    for seed in range(3):
        random = np.random.default_rng(seed)
        matcher = grammars.matcher(grammar, 0, [eos])
        tokens: list[int] = text.encode_plain("<think>\nSo.\n</think>\n\n") if thinks else []
        while len(tokens) < 1000 and not matcher.is_complete(tokens):
            row = random.normal(size=size).astype(np.float32)
            row[eos] = 3 if len(tokens) < 100 else 50  # one call or several, and an end
            token = int(matcher.edit(row, tokens).argmax())
            if token == eos:
                break
            tokens.append(token)
        writer = Writer(text.stream([]), stops, reply.reader([1, 2], stops))
        written = "".join(writer.write(tokens)) + writer.finish()
        calls: Any = writer.reply and writer.reply.calls
        assert calls and written == "", text.decode(tokens)
        assert not thinks or (writer.reply and writer.reply.reasoning == "So.")
        for call in calls:
            tool = next(tool for tool in TOOLS if tool["function"]["name"] == call.name)
            found = json.loads(call.arguments)
            jsonschema.validate({k: v for k, v in found.items() if v is not None}, schema_parameters(tool))
            assert found.keys() <= schema_parameters(tool)["properties"].keys()
