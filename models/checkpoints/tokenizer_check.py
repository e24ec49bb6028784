"""What the tokenizers library does with a stranger's tokenizer.json: whether it loads, encodes and decodes.

The library is Rust. A file can make it panic, run for hours or take all memory: normalizers of a chain that each double
the text, a regular expression that backtracks, a replacement of nothing. So a tokenizer is tried in a helper process
first, which runs this file as a script, and how much longer it can make a text is computed from its parts.
"""

from __future__ import annotations

import base64
import json
import math
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

VERSION = 1  # of the check: a tokenizer that another version has let pass is checked again
MEMORY = 4 << 30  # bytes of address space that the helper may take, and as many more as follow for each of the file's
MEMORY_PER_BYTE = 64
LARGEST_GROWTH = 1024  # times that a text's bytes may become more; in real tokenizers up to about 150
MOST_PARTS = 256  # of a chain
PROBE = 1000  # characters of a text of one repeated character
CHUNK = 4096  # ids that are decoded together
SAMPLE = """The quick brown fox doesn't jump; it's 12,345.67 metres away!  (Really?)
	def f(x): return {"a": [x ** 2, None]}  # code\r\n
Ünïcödé — naïve café, Straße, ЖЗИ, ελληνικά, العربية, हिन्दी, 漢字かな交じり文, 한국어, 🙂 e\u0301 ﬁ ½ \u200d\ufeff"""
REPEATED = (
    "a",
    "A",
    "1",
    " ",
    "\n",
    "\t",
    "-",
    "_",
    ".",
    "é",
    "漢",
    "🙂",
    "\u0301",
    "ab",
    "a ",
    " a",
    "1a",
    "'s",
    "\r\n",
    "<|",
)


def probe_texts() -> list[str]:
    """Texts that a tokenizer is tried on: ordinary ones, and those that backtracking expressions are slow on."""
    repeated = [unit * (PROBE // len(unit)) for unit in REPEATED]
    return ["", "a", SAMPLE, SAMPLE[::-1], *repeated, *(text + "!" for text in repeated)]


def panics(error: BaseException) -> bool:
    """Whether the exception is a panic of Rust code, which is no `Exception`."""
    return type(error).__name__ == "PanicException"


def growth_problem(tokenizer: Any) -> str | None:
    """Why encoding or decoding could make texts far longer, as part of a sentence; None if it cannot."""
    before = [part for name in ("normalizer", "pre_tokenizer") for part in parts(getattr(tokenizer, name))]
    for name, chain in (("normalizer", before), ("decoder", parts(tokenizer.decoder))):
        if len(chain) > MOST_PARTS:
            return f"its {name} has {len(chain)} parts; at most {MOST_PARTS} are taken"
        growth = math.prod(map(part_growth, chain))
        if growth > LARGEST_GROWTH:
            return f"its {name} can make a text more than {LARGEST_GROWTH} times longer"
    return None


def parts(component: Any) -> list[dict[str, Any]]:
    """The parts of a normalizer, pre-tokenizer or decoder, those of sequences in sequences included."""
    if component is None:
        return []
    found, waiting = [], [json.loads(component.__getstate__())]
    while waiting:
        part = waiting.pop()
        inner = [value for key in ("normalizers", "pretokenizers", "decoders") for value in part.get(key) or ()]
        waiting += inner
        if not inner:
            found.append(part)
    return found


def part_growth(part: dict[str, Any]) -> float:
    """How many times longer, in bytes, one part can make a text."""
    kind = part.get("type")
    if kind == "Replace":
        wanted, content = part.get("pattern") or {}, len(str(part.get("content", "")).encode())
        if "String" in wanted:
            old = len(wanted["String"].encode())
            return max(content / old, 1) if old else math.inf
        return 1 + content  # of a regular expression, which may match before every character
    if kind == "Precompiled":
        data = base64.b64decode(part.get("precompiled_charsmap") or "")
        texts = data[4 + int.from_bytes(data[:4], "little") :]  # behind a table: texts, each with a zero at its end
        return max(map(len, texts.split(b"\0")), default=1) or 1
    if kind == "ByteLevel":
        return 2
    if kind == "Metaspace":
        return len(str(part.get("replacement", " ")).encode())
    if kind in ("BPEDecoder", "CTC"):  # which put spaces in the place of this text
        replaced = part.get("suffix") if kind == "BPEDecoder" else part.get("word_delimiter_token")
        return 1 if replaced else math.inf
    return 1  # Unicode's forms, which do not change a text twice; what adds a few characters, or takes some away


def problem_of(text: str, added: list[dict[str, Any]]) -> str | None:
    """What is wrong with the tokenizer in `text`, as part of a sentence; None if it loads and passes all probes.

    added: the tokens that the files beside it add, as keyword arguments of AddedToken.
    """
    from tokenizers import AddedToken, Tokenizer

    try:
        tokenizer = Tokenizer.from_str(text)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.add_tokens([AddedToken(**token) for token in added])
    except BaseException as error:
        return f"the tokenizers library cannot read it: {error}" if panics(error) else None  # others say it themselves
    if problem := growth_problem(tokenizer):
        return problem
    try:
        try_out(tokenizer)
    except BaseException as error:
        if not panics(error):
            raise
        return f"the tokenizers library fails with it: {error}"
    return None


def try_out(tokenizer: Any) -> None:
    """Encode and decode probes. Exceptions are fine, such as that of a vocabulary which lacks a character."""
    for text in probe_texts():
        with suppress(Exception):
            ids = tokenizer.encode(text, add_special_tokens=True).ids
            tokenizer.decode(ids, skip_special_tokens=True)
            tokenizer.decode(ids[:1], skip_special_tokens=False)
    ids = sorted(tokenizer.get_vocab(with_added_tokens=True).values())
    for start in range(0, len(ids), CHUNK):
        with suppress(Exception):
            tokenizer.decode(ids[start : start + CHUNK], skip_special_tokens=False)


def main() -> None:
    request = json.load(sys.stdin)
    sys.path.append(request["packages"])
    text = Path(request["file"]).read_bytes().decode()
    if sys.platform != "win32":  # which has no such limits
        import resource

        most = MEMORY + MEMORY_PER_BYTE * len(text)
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_AS, (most, most))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    json.dump({"problem": answer(text, request["added"])}, sys.stdout)


def answer(text: str, added: list[dict[str, Any]]) -> str | None:
    """As `problem_of`. Exceptions that the file causes are its problem, too; a failing import is not."""
    import tokenizers  # noqa: F401

    try:
        return problem_of(text, added)
    except MemoryError:
        return "it takes more memory than is allowed"
    except Exception as error:
        return f"it cannot be tried: {type(error).__name__}: {error}"


if __name__ == "__main__":
    main()
