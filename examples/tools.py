"""A model that calls Python functions: python tools.py TARGET DRAFT QUESTION

The model needs a chat template with tools (Qwen2.5, Qwen3, Llama 3, Mistral, SmolLM3). It may call functions in several
rounds; in the last one it has to answer.
"""

import json
import sys
from typing import Any, Literal

from pard_onnx import Pair, Result, ToolCall, load

ROUNDS = 4


def list_cities() -> list[str]:
    """The cities whose weather is known."""
    return ["Ulm", "Köln"]


def get_weather(city: Literal["Ulm", "Köln"], day: Literal["today", "tomorrow"] = "today") -> str:
    """The weather of a city.

    Args:
        city: The city's name
        day: Today or tomorrow
    """
    return "rain" if (city, day) == ("Ulm", "today") else "sun"


TOOLS = {tool.__name__: tool for tool in (list_cities, get_weather)}


def answer_of(call: ToolCall) -> dict[str, Any]:
    """The message with what a call gives. Its errors are for the model, which may call again."""
    try:
        content = json.dumps(TOOLS[call.name](**json.loads(call.arguments)), ensure_ascii=False)
    except (KeyError, TypeError, ValueError) as error:
        content = f"error: {error!r}"
    return {"role": "tool", "tool_call_id": call.id, "name": call.name, "content": content}


def ask(pair: Pair, question: str, rounds: int = ROUNDS, **options: Any) -> Result:
    """The model's answer, after at most so many rounds of calls."""
    options = {"max_new_tokens": 512, "tools": list(TOOLS.values()), **options}
    with pair.chat() as chat:
        result = chat.send(question, **options)
        for left in reversed(range(rounds)):
            if result.finish_reason != "tool_calls":
                break
            answers = [answer_of(call) for call in result.tool_calls]
            for call, message in zip(result.tool_calls, answers, strict=True):
                print(f"{call.name}({call.arguments}) -> {message['content']}")
            result = chat.send(answers, **(options if left else options | {"tool_choice": "none"}))
        return result


if __name__ == "__main__":
    target, draft, question = sys.argv[1:4]
    with load(target, draft) as pair:
        print(ask(pair, question).text)
