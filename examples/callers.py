"""Several callers of one pair: python callers.py TARGET [DRAFT]

The same requests from threads, from tasks of asyncio, and one after the other: the texts are the same. Requests take
turns step by step, so a short one is not stuck behind a long one; in sum they take as long as before.
"""

import asyncio
import sys
from concurrent.futures import ThreadPoolExecutor
from time import perf_counter

from pard_onnx import Pair, Result, load

PROMPTS = [f"def f{number}(items):\n    " for number in range(6)]
LENGTHS = [120, 20, 20, 60, 20, 20]  # tokens


def one_by_one(pair: Pair) -> list[Result]:
    return [pair.generate(prompt, max_new_tokens=most) for prompt, most in zip(PROMPTS, LENGTHS, strict=True)]


def in_threads(pair: Pair) -> list[Result]:
    with ThreadPoolExecutor(len(PROMPTS)) as executor:
        return list(executor.map(lambda prompt, most: pair.generate(prompt, max_new_tokens=most), PROMPTS, LENGTHS))


async def in_tasks(pair: Pair) -> list[Result]:
    """The event loop stays free. A task that is cancelled, here by a timeout, ends its generation."""
    async with asyncio.timeout(600):
        asked = zip(PROMPTS, LENGTHS, strict=True)
        return await asyncio.gather(*(pair.agenerate(prompt, max_new_tokens=most) for prompt, most in asked))


def main(pair: Pair) -> None:
    ways = {
        "one by one": lambda: one_by_one(pair),
        "in threads": lambda: in_threads(pair),
        "in tasks": lambda: asyncio.run(in_tasks(pair)),
    }
    found = {}
    for name, run in ways.items():
        start = perf_counter()
        found[name] = run()
        waited = max(result.stats.queued for result in found[name])
        print(f"{name}: {perf_counter() - start:.2f} s, waited for a place at most {waited:.2f} s")
    texts = [[result.text for result in results] for results in found.values()]
    print("the same texts:", texts[0] == texts[1] == texts[2])


if __name__ == "__main__":
    with load(*sys.argv[1:3], cache_bytes=0) as pair:  # so that no way profits from the one before
        main(pair)
