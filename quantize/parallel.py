"""Work on blocks in order, a few at a time in threads: numpy and ONNX Runtime's packers leave the lock to others."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

WORKERS = os.cpu_count() or 1
Job = TypeVar("Job")
Found = TypeVar("Found")


def in_order(
    work: Callable[[Job], Found], jobs: Iterable[Job], start: Callable[[], object] = lambda: None
) -> Iterator[Found]:
    """work(job) of each job, in the jobs' order; one result for each worker waits at most. start: in each thread."""
    pending: deque[Future[Found]] = deque()
    with ThreadPoolExecutor(WORKERS, initializer=start) as pool:
        for job in jobs:
            pending.append(pool.submit(work, job))
            if len(pending) > WORKERS:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
