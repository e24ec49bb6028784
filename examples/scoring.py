"""How likely texts are: python scoring.py TARGET [DRAFT]

Nothing is generated to choose an answer: each one's tokens are scored in one pass. The scores are the model's own log
probabilities, before temperature and filters, and do not depend on a draft.
"""

import math
import sys

from pard_onnx import Pair, load

QUESTION = "x = [1, 2, 3]\nprint(len("
ANSWERS = ["x))", "y))", "x]]"]
TEXT = "def add(a, b):\n    return a + b\n"


def ranked(pair: Pair, question: str, answers: list[str]) -> list[tuple[str, float]]:
    """The answers with their log probabilities a token, the likeliest first: long answers are not at a disadvantage."""
    scores = pair.score(question, answers)
    each = [score.logprob / len(score.tokens) for score in scores]
    return sorted(zip(answers, each, strict=True), key=lambda one: one[1], reverse=True)


def perplexity(pair: Pair, text: str) -> float:
    result = pair.generate(text, prompt_logprobs=0, max_new_tokens=1)
    found = [one.logprob for one in result.prompt_logprobs or () if one]
    return math.exp(-sum(found) / len(found))


def doubtful(pair: Pair, prompt: str, below: float = 0.5) -> list[str]:
    """The places of a generated text where the model was not sure, with what it would have written instead."""
    result = pair.generate(prompt, logprobs=2, max_new_tokens=40)
    found = []
    for one in result.logprobs or ():
        if math.exp(one.logprob) < below:
            others = ", ".join(repr(other.text) for other in one.top if other.token != one.token)
            found.append(f"{one.text!r} ({math.exp(one.logprob):.0%}), or {others}")
    return found


def main(pair: Pair) -> None:
    for answer, logprob in ranked(pair, QUESTION, ANSWERS):
        print(f"{logprob:8.3f}  {answer}")
    print(f"perplexity {perplexity(pair, TEXT):.2f}")
    print(*doubtful(pair, "def fibonacci(n):"), sep="\n")


if __name__ == "__main__":
    with load(*sys.argv[1:3]) as pair:
        main(pair)
