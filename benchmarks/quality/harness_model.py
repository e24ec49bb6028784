"""`PardOnnx`: an exported pair as a model of lm-evaluation-harness, registered there as "pard-onnx".

Texts are encoded, cut and windowed as in the harness's own models, so that numbers compare. Needs the extra `eval`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from pard_onnx.models.checks import require_whole
from pard_onnx.models.errors import BadInput, TooLong
from pard_onnx.runtime.pair import Pair, load
from pard_onnx.runtime.scoring import Score

NAME = "pard-onnx"
BATCH = 32  # pairs that are scored in one call, between two steps of the progress bar
NEW_TOKENS = 256  # where a task does not say how many; as in the harness's own models
LENGTH_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # the first one counts
SEED = 1234  # of drawn tokens; the seed of the harness

Pairing = tuple[tuple[str, str] | None, list[int], list[int]]  # the two texts, and their ids


@register_model(NAME)
class PardOnnx(TemplateLM):  # type: ignore[misc]  # the harness has no types
    """A model of the harness. `max_length` counts as the harness does: the context and its last token are one more."""

    def __init__(
        self,
        target: str | Pair,
        draft: str | None = None,
        provider: str = "cpu",
        threads: int | None = None,
        max_gen_toks: int = NEW_TOKENS,
        draft_length: Any = "auto",
        seed: int = SEED,
        batch_size: object = None,
        max_batch_size: object = None,
        device: object = None,
    ) -> None:
        """target: as of `load`, or a pair that is loaded already. seed: of the first request that draws tokens; later
        ones have the next seeds. batch_size, max_batch_size, device: are given by the harness, and have no use here.
        """
        super().__init__()
        self.pair = target if isinstance(target, Pair) else load(target, draft, provider, threads)
        self.max_gen_toks = require_whole("max_gen_toks", max_gen_toks, 1)
        self.draft_length, self._seed = draft_length, seed
        special, ids = self.pair.text.special_tokens, self.pair.text.vocabulary()
        ends = self.pair.target_manifest.spec.vocabulary.eos_ids
        begin, end = (ids.get(special.get(name, "")) for name in ("bos_token", "eos_token"))
        self._end = end if end is not None else ends[0] if ends else None
        self._begin = begin if begin is not None else self._end

    @property
    def eot_token_id(self) -> int:
        """The token that ends texts. Raises BadInput for a model without one."""
        if self._end is None:
            raise BadInput(f"{self.pair.target_name} has no EOS token, which tasks without a context need")
        return self._end

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context: BOS, or EOS where there is none."""
        return self.eot_token_id if self._begin is None else self._begin

    @property
    def max_length(self) -> int:
        """The most tokens that the model reads; one more is predicted."""
        return self.pair.capacity - 1

    @property
    def tokenizer_name(self) -> str:
        """The target's name, as a part of file names."""
        return Path(self.pair.target_name).name

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The target's template, for the record of a run; None if it is not asked for."""
        return self.pair.target_manifest.spec.chat_template if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a conversation; without add_generation_prompt it ends in the last message, which goes on."""
        text = self.pair.text.render(chat_history, {"add_generation_prompt": add_generation_prompt})
        if add_generation_prompt:
            return text
        last = chat_history[-1]["content"].strip()
        return text[: text.rindex(last) + len(last)]

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: object) -> list[int]:
        """The ids of a text. With add_special_tokens None, BOS is not added to a text that begins with it."""
        if add_special_tokens is None:
            begin = self.pair.text.special_tokens.get("bos_token")
            add_special_tokens = not (begin and string.startswith(begin))
        return self.pair.tokenize(string, add_special_tokens=add_special_tokens)

    def _loglikelihood_tokens(
        self, requests: Sequence[Pairing], disable_tqdm: bool = False, **_: object
    ) -> list[tuple[float, bool]]:
        """The log probability of each continuation and whether it is greedy. Contexts that are too long lose their
        first tokens."""
        out: list[tuple[float, bool]] = []
        waiting = iter(requests)
        with tqdm(total=len(requests), disable=disable_tqdm, desc="Running loglikelihood requests") as bar:
            while batch := list(islice(waiting, BATCH)):
                for (texts, _context, _continuation), score in zip(batch, self._scores(batch), strict=True):
                    out.append((score.logprob, score.is_greedy))
                    if texts is not None:
                        self.cache_hook.add_partial("loglikelihood", texts, out[-1])
                bar.update(len(batch))
        return out

    def _scores(self, batch: Sequence[Pairing]) -> list[Score]:
        room = self.max_length + 1
        contexts = [context[max(0, len(context) + len(rest) - room) :] for _, context, rest in batch]
        for context, (_, _context, rest) in zip(contexts, batch, strict=True):
            if not context:
                raise TooLong(
                    f"a continuation of {len(rest)} tokens leaves no room in a context of {room} for any before"
                )
        return self.pair.score(contexts, [rest for _, _context, rest in batch])

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log probability of each text, in windows with as much context as the model reads."""
        out: list[float] = []
        for request in tqdm(requests, disable=disable_tqdm, desc="Running loglikelihood_rolling requests"):
            (text,) = request.args
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            pairs: list[Pairing] = [(None, *make_disjoint_window(window)) for window in windows]
            out.append(sum(found for found, _ in self._loglikelihood_tokens(pairs, disable_tqdm=True)))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), out[-1])
        return out

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The text that follows each context, up to the first string of `until`."""
        out: list[str] = []
        for number, request in enumerate(tqdm(requests, disable=disable_tqdm, desc="Running generate_until requests")):
            context, arguments = request.args
            options = generation_options(arguments, self.max_gen_toks) | {"draft_length": self.draft_length}
            if options.get("temperature"):
                options = {"seed": self._seed + number} | options
            room = self.pair.capacity - options["max_new_tokens"]
            if room < 1:
                wanted = options["max_new_tokens"]
                raise TooLong(
                    f"max_gen_toks {wanted} leaves no room for a context in {self.pair.capacity} tokens; give less"
                )
            out.append(self.pair.generate(self.tok_encode(context)[-room:], **options).text)
            self.cache_hook.add_partial("generate_until", request.args, out[-1])
        return out


def generation_options(arguments: Mapping[str, Any], new_tokens: int) -> dict[str, Any]:
    """A task's generation arguments as keyword arguments of `Pair.generate`, which refuses those that it does not know.

    new_tokens: where the task does not say how many.
    """
    known = dict(arguments)
    lengths = [known.pop(name) for name in LENGTH_NAMES if known.get(name) is not None]
    until = known.pop("until", None) or ()
    draws = known.pop("do_sample", None)
    if draws is False or (draws is None and not known.get("temperature")):
        known = {name: value for name, value in known.items() if name not in ("temperature", "top_k", "top_p", "min_p")}
    elif draws and known.get("temperature") is None:
        known["temperature"] = 1.0
    stops = [until] if isinstance(until, str) else until
    return known | {
        "max_new_tokens": int(lengths[0]) if lengths else new_tokens,
        "stop": [stop for stop in stops if stop],
    }
