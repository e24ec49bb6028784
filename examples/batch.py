"""A file of prompts: python batch.py TARGET DRAFT IN.jsonl OUT.jsonl

Each line of the input is an object with an "id" and a "prompt" (text, or a list of messages). Each line of the output
has the id, the text and the finish reason. A run that was interrupted goes on where it stopped: ids that are in the
output are left out, and a last line that was not written to its end is written again.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

from pard_onnx import BadInput, Pair, load


def records(path: Path) -> Iterator[dict]:
    with path.open(encoding="utf-8") as lines:
        yield from (json.loads(line) for line in lines if line.strip())


def finished(output: Path) -> set:
    """The ids that the output has; the beginning of a line at its end is cut off."""
    if not output.exists():
        return set()
    content = output.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        output.write_bytes(whole)
    return {record["id"] for record in records(output)}


def run(pair: Pair, source: Path, output: Path) -> int:
    """Generate what is missing; the number of prompts that were answered now."""
    done, count = finished(output), 0
    with output.open("a", encoding="utf-8") as file:
        for record in records(source):
            if record["id"] in done:
                continue
            try:
                result = pair.generate(record["prompt"], chat=True, max_new_tokens=256)
                found = {"text": result.text, "finish_reason": result.finish_reason}
            except BadInput as error:  # a prompt that is too long, say; the others go on
                found = {"error": str(error)}
            file.write(json.dumps({"id": record["id"], **found}, ensure_ascii=False) + "\n")
            file.flush()
            count += 1
    return count


if __name__ == "__main__":
    target, draft, source, output = sys.argv[1:5]
    with load(target, draft) as pair:
        print(run(pair, Path(source), Path(output)), "prompts answered")
