"""Facts out of lines of text, as JSON: python extraction.py TARGET DRAFT FILE; needs pip install "pard-onnx[guided]"

The schema is followed token by token, so the reply is an `Order` or was cut short. It says nothing of whether the facts
are right: that is up to the model, and to checks such as `problems`.
"""

import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pard_onnx import Pair, load

UNITS = ("kg", "l", "pieces")
SCHEMA = {
    "type": "object",
    "properties": {
        "article": {"type": "string", "minLength": 1, "maxLength": 40},
        "amount": {"type": "integer", "minimum": 1, "maximum": 1000},
        "unit": {"enum": UNITS},
        "urgent": {"type": "boolean"},
    },
    "required": ["article", "amount", "unit", "urgent"],
    "additionalProperties": False,
}
TASK = "What does this order ask for? Answer with one JSON object: article, amount, unit (kg, l or pieces), urgent."


@dataclass(frozen=True)
class Order:
    article: str
    amount: int
    unit: str
    urgent: bool

    def problems(self, line: str) -> Iterator[str]:
        """What a schema cannot say."""
        if str(self.amount) not in line:
            yield f"{self.amount} is not in the text"
        if self.article.lower() not in line.lower():
            yield f"{self.article!r} is not in the text"


def extract(pair: Pair, lines: Iterable[str]) -> Iterator[tuple[str, Order | None]]:
    """Each line with its order; None where the reply was cut short."""
    for line in filter(None, map(str.strip, lines)):
        messages = [{"role": "system", "content": TASK}, {"role": "user", "content": line}]
        result = pair.generate(messages, response_format=SCHEMA, max_reasoning_tokens=100, max_new_tokens=400)
        yield line, Order(**json.loads(result.text)) if result.finish_reason == "stop" else None


if __name__ == "__main__":
    target, draft, file = sys.argv[1:4]
    with load(target, draft) as pair:
        for line, order in extract(pair, Path(file).read_text(encoding="utf-8").splitlines()):
            print(line, "->", order or "cut short", *(order.problems(line) if order else ()), sep="\n   ")
