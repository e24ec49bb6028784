"""Scores of given tokens: the target's log probabilities of a prompt, or of a continuation."""

from __future__ import annotations

from collections.abc import Callable, Generator
from collections.abc import Sequence as Tokens
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from time import perf_counter

from pard_onnx.models.errors import BadInput, TooLong

from .decoding.drafter import Drafter, NoDraft
from .decoding.loop import Halted, PromptLogprobs, Step, TargetModel, go_on, padded_step
from .sampling.logprobs import LogprobChooser, RowLogprobs, TokenLogprob
from .sampling.sampler import require_finite
from .sessions.session import Rows, do_nothing
from .tuning.steps import Widths

SCORED_BYTES = 1 << 25  # of a step's logits, of which a whole prompt would have gigabytes
WIDTH_MULTIPLE = 8  # a step of so many tokens has a width of every set that may be exact


@dataclass(frozen=True, slots=True)
class Score:
    """How likely a continuation is after its prompt."""

    logprob: float  # of the whole continuation: the sum of its tokens'
    is_greedy: bool  # whether greedy decoding writes it: each token is the most likely one
    tokens: tuple[TokenLogprob, ...]
    prompt_tokens: int  # the number of tokens before it


@dataclass(frozen=True, slots=True)
class Passage:
    """Token ids, of which those from `first` on are scored."""

    ids: tuple[int, ...]
    first: int

    def require_room(self, capacity: int, longer: str) -> None:
        """BadInput if there is nothing to score, or nothing before it; TooLong if the tokens exceed the capacity."""
        if not self.first:
            raise BadInput(
                "no token is before the continuation: the prompt is empty, or its only token goes on into the "
                "continuation; begin with other text, or with a token such as EOS by its id"
            )
        if self.first >= len(self.ids):
            raise BadInput("the continuation has no token of its own; score a text that adds to the prompt")
        if len(self.ids) > capacity:
            raise TooLong(
                f"prompt and continuation have {len(self.ids)} tokens, but the capacity is {capacity}; shorten them, "
                f"or {longer}"
            )


@dataclass(frozen=True, slots=True)
class Form:
    """The form of the steps that read tokens to score them."""

    chunk: int  # the most tokens of a step whose rows are not needed
    scored: int  # the most tokens of a step whose rows are needed: it bounds the memory of logits
    widths: Widths  # that steps may have


def step_form(chunk: int, columns: int, widths: Widths) -> Form:
    """The form of steps for rows of so many columns; chunk: tokens of a step in prefill."""
    rows = SCORED_BYTES // (4 * columns) // WIDTH_MULTIPLE * WIDTH_MULTIPLE
    return Form(chunk, min(chunk, max(rows, WIDTH_MULTIPLE)), widths)


class Scorer:
    """Computes the log probabilities of a passage's tokens from `first` on. It goes on where it was interrupted."""

    def __init__(self, passage: Passage, form: Form, rows: RowLogprobs) -> None:
        self._passage, self._form, self._rows = passage, form, rows
        self.found: list[TokenLogprob] = []
        self._taken = False

    @property
    def is_complete(self) -> bool:
        """Whether all tokens are scored."""
        return self._passage.first + len(self.found) == len(self._passage.ids)

    def run(
        self, target: TargetModel, between_steps: Callable[[], None] = do_nothing, drafter: Drafter | None = None
    ) -> None:
        """Score what is left. The target's cache holds the beginning of the ids, and afterwards all but the last.

        between_steps: is called between two steps, when other sequences may use the model. drafter: of a generation
        that goes on from these rows; it reads the features of these tokens.
        """
        ids, form = self._passage.ids, self._form
        row = self._passage.first + len(self.found) - 1  # the row of the token before the next one to score
        drafter = drafter or NoDraft()
        go_on(target, drafter, min(target.length, row))

        def step(fed: Tokens[int], keep: int) -> Rows:
            rows = padded_step(target, fed, keep, form.widths)
            drafter.saw(fed, rows.features)
            return rows

        def after_step() -> None:  # other sequences' steps may overwrite the rows
            drafter.keep_up(ids)
            between_steps()

        while target.length < row:
            step(ids[target.length : min(row, target.length + form.chunk)], 1)
            after_step()
        while (start := target.length) < len(ids) - 1:
            fed = ids[start : min(start + form.scored, len(ids) - 1)]
            scored: list[TokenLogprob] = []
            for position, logits in enumerate(step(fed, len(fed)).logits, start + 1):
                require_finite(float(logits.max()), position)
                scored.append(self._rows.of(logits, ids[position]))
            self.found += scored
            after_step()

    def take_prompt(self) -> PromptLogprobs | None:
        """Those of a prompt, whose first token has none: once, when all are there."""
        if self._taken or not self.is_complete:
            return None
        self._taken = True
        return None, *self.found


def with_prompt(
    rounds: Generator[Step, None, None],
    target: TargetModel,
    scorer: Scorer,
    between_steps: Callable[[], None] = do_nothing,
    drafter: Drafter | None = None,
) -> Generator[Step, None, None]:
    """The rounds, of which the first has the log probabilities of the prompt; they are computed before it.

    drafter: of the rounds, if it reads the target's features.
    """
    with closing(rounds):
        start = perf_counter()
        if not scorer.is_complete:
            with suppress(Halted):  # the rounds end before their first step then, and say why
                scorer.run(target, between_steps, drafter)
        seconds = perf_counter() - start
        for step in rounds:
            found = scorer.take_prompt()
            yield replace(step, prompt_logprobs=found, verify_seconds=step.verify_seconds + seconds) if found else step


def with_logprobs(rounds: Generator[Step, None, None], chooser: LogprobChooser) -> Generator[Step, None, None]:
    """The rounds with the log probabilities of their tokens, which this chooser has chosen."""
    with closing(rounds):
        for step in rounds:
            yield replace(step, logprobs=chooser.found[: len(step.tokens)])


def score_of(tokens: Tokens[TokenLogprob], prompt_tokens: int, top: int) -> Score:
    """The score of tokens that have at least the most likely one beside them, of which `top` are kept."""
    greedy = all(one.top[0].token == one.token for one in tokens)
    kept = tuple(replace(one, top=one.top[:top]) for one in tokens)
    return Score(sum(one.logprob for one in tokens), greedy, kept, prompt_tokens)
