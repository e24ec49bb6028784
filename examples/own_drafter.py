"""A drafter of one's own, tried without a model: python own_drafter.py

`PairsOfTokens` remembers which token followed each token last, and proposes these. Whatever a drafter proposes, the
text is the target's own; so it is tried against plain decoding, and the steps of the target are counted.
"""

from collections.abc import Sequence

from pard_onnx.testing import NOTHING, Drafter, NoDraft, Proposal, ScriptedTarget, continuation

PROMPT = [0, 1, 2, 3]


class PairsOfTokens(Drafter):
    """Proposes the tokens that followed the last ones before."""

    def __init__(self) -> None:
        self._after: dict[int, int] = {}
        self._read = 0  # tokens of the conversation whose followers are known

    @property
    def length(self) -> int:
        return self._read

    def propose(self, committed: Sequence[int], k: int) -> Proposal:
        for place in range(max(1, self._read), len(committed)):
            self._after[committed[place - 1]] = committed[place]
        self._read = len(committed)
        found: list[int] = []
        token = committed[-1]
        while len(found) < k and token in self._after:
            token = self._after[token]
            found.append(token)
        return Proposal(tuple(found), (1.0,) * len(found), "pairs") if found else NOTHING

    def rollback(self, length: int) -> None:
        self._read = min(self._read, length)


def next_token(tokens: Sequence[int]) -> int:
    """A text that repeats itself, and sometimes does not."""
    return (tokens[-1] + (2 if len(tokens) % 11 == 0 else 1)) % 7


def main() -> None:
    plain, drafted = ScriptedTarget(next_token), ScriptedTarget(next_token)
    expected = continuation(plain, NoDraft(), PROMPT, 60)
    found = continuation(drafted, PairsOfTokens(), PROMPT, 60)
    print("the same text:", found == expected)
    print(f"{len(found)} tokens in {len(drafted.widths)} steps instead of {len(plain.widths)}")


if __name__ == "__main__":
    main()
