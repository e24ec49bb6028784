"""`Metrics`: what a server has done, in Prometheus' text format."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Mapping

from pard_onnx.runtime.result import Result, Stats

from .registry import OpenModel

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
BOUNDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)  # seconds, of histograms
Labels = Mapping[str, str]
# Counters by name, and what each generation adds to them
COUNTERS: dict[str, tuple[str, Callable[[Stats], float]]] = {
    "prompt_tokens": ("Tokens of prompts.", lambda stats: stats.prompt_tokens),
    "cached_prompt_tokens": ("Tokens of prompts whose KV rows were there already.", lambda stats: stats.cached_tokens),
    "generated_tokens": ("New tokens.", lambda stats: stats.new_tokens),
    "rounds": ("Rounds of drafting and verifying.", lambda stats: stats.rounds),
    "committed_tokens": ("Tokens that rounds committed.", lambda stats: sum(stats.accepted)),
    "proposed_tokens": ("Draft tokens that were verified.", lambda stats: sum(stats.proposed)),
    "accepted_tokens": ("Draft tokens that were accepted.", lambda stats: sum(stats.matched)),
    "prefill_seconds": ("Time of reading prompts.", lambda stats: stats.seconds.prefill),
    "draft_seconds": ("Time of the draft.", lambda stats: stats.seconds.draft),
    "verify_seconds": ("Time of the target's rounds.", lambda stats: stats.seconds.verify),
    "queued_seconds": ("Time that generations waited for a place.", lambda stats: stats.queued),
}


class Histogram:
    """Durations, by buckets."""

    def __init__(self) -> None:
        self._counts, self._sum = [0] * (len(BOUNDS) + 1), 0.0

    def add(self, seconds: float) -> None:
        self._counts[bisect_left(BOUNDS, seconds)] += 1
        self._sum += seconds

    def lines(self, name: str) -> Iterable[str]:
        total = 0
        for bound, count in zip((*map(str, BOUNDS), "+Inf"), self._counts, strict=True):
            total += count
            yield f'{name}_bucket{{le="{bound}"}} {total}'
        yield f"{name}_sum {self._sum:.6f}"
        yield f"{name}_count {total}"


class Metrics:
    """Counts of one server. For the event loop's thread."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = dict.fromkeys(COUNTERS, 0)
        self._requests: Counter[tuple[str, int]] = Counter()
        self._reasons: Counter[str] = Counter()
        self._first, self._whole = Histogram(), Histogram()
        self._seconds = 1.0  # a recent mean of a generation's time

    def count(self, result: Result, first: float | None) -> None:
        """A generation that has ended. first: seconds to its first chunk, its wait included."""
        stats: Stats = result.stats
        for name, (_, amount) in COUNTERS.items():
            self._sums[name] += amount(stats)
        self._reasons[result.finish_reason] += 1
        if first is not None:
            self._first.add(first)
        self._whole.add(stats.seconds.total)
        self._seconds += 0.2 * (stats.seconds.total - self._seconds)

    def count_unfinished(self) -> None:
        """A generation that failed, or whose client went away."""
        self._reasons["abandoned"] += 1

    def count_request(self, path: str, status: int) -> None:
        self._requests[path, status] += 1

    def retry_after(self, ahead: int, places: int) -> int:
        """Seconds after which a place may be free. ahead: generations that run and wait."""
        return min(60, max(1, round(self._seconds * ahead / (2 * places))))

    def text(self, models: Iterable[OpenModel]) -> str:
        """All numbers, as Prometheus reads them."""
        lines: list[str] = []

        def write(name: str, kind: str, help_: str, samples: Iterable[tuple[Labels, float]]) -> None:
            full = f"pard_{name}"
            lines.extend((f"# HELP {full} {help_}", f"# TYPE {full} {kind}"))
            lines.extend(f"{full}{_labels(labels)} {value:.6g}" for labels, value in samples)

        for name, (help_, _) in COUNTERS.items():
            lines.extend((f"# HELP pard_{name}_total {help_}", f"# TYPE pard_{name}_total counter"))
            lines.append(f"pard_{name}_total {_plain(self._sums[name])}")
        requests = [({"path": path, "status": str(status)}, n) for (path, status), n in sorted(self._requests.items())]
        write("requests_total", "counter", "Requests that were answered.", requests)
        reasons = [({"reason": reason}, n) for reason, n in sorted(self._reasons.items())]
        write("generations_total", "counter", "Generations by how they ended.", reasons)
        sums = self._sums
        rates = (
            ("prefill_tokens_per_second", "Mean rate of reading prompts.",
             sums["prompt_tokens"] - sums["cached_prompt_tokens"], sums["prefill_seconds"]),
            ("decode_tokens_per_second", "Mean rate of new tokens of one generation.",
             sums["committed_tokens"], sums["draft_seconds"] + sums["verify_seconds"]),
            ("mean_accepted_tokens", "Mean tokens a round.", sums["committed_tokens"], sums["rounds"]),
        )  # fmt: skip
        for name, help_, amount, whole in rates:
            write(name, "gauge", help_, [({}, amount / whole if whole else 0.0)])
        for name, help_, histogram in (
            ("time_to_first_chunk_seconds", "From the request to its first tokens, the wait included.", self._first),
            ("generation_seconds", "Whole generations, the wait included.", self._whole),
        ):
            lines.extend((f"# HELP pard_{name} {help_}", f"# TYPE pard_{name} histogram"))
            lines.extend(histogram.lines(f"pard_{name}"))
        gauges: dict[str, tuple[str, list[tuple[Labels, float]]]] = {
            "generations_running": ("Generations that have a place.", []),
            "generations_waiting": ("Generations that wait for a place.", []),
            "model_weight_bytes": ("Weights of loaded models.", []),
            "kv_cache_kept_bytes": ("KV rows that are kept for later requests.", []),
            "kv_cache_live_bytes": ("The most that KV caches of running generations take.", []),
        }
        for model in models:
            for name, value in _of_model(model).items():
                gauges[name][1].append(({"model": model.name}, value))
        for name, (help_, samples) in gauges.items():
            write(name, "gauge", help_, samples)
        return "\n".join(lines) + "\n"


def _of_model(model: OpenModel) -> dict[str, float]:
    engine = model.pair.engine
    running, waiting = engine.occupancy
    return {
        "generations_running": running,
        "generations_waiting": waiting,
        "model_weight_bytes": model.weight_bytes,
        "kv_cache_kept_bytes": engine.prefixes.bytes,
        "kv_cache_live_bytes": running * engine.sequence_bytes,
    }


def _plain(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.6f}"


def _labels(labels: Labels) -> str:
    if not labels:
        return ""
    escaped = {
        name: value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") for name, value in labels.items()
    }
    return "{" + ",".join(f'{name}="{value}"' for name, value in escaped.items()) + "}"
