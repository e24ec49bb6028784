"""Downloads of huggingface_hub, reported to a `Progress` in place of its bars on the terminal."""

from __future__ import annotations

import io
from threading import Lock
from typing import Any

from .checks import Progress

STAGE, BYTES = "download", "B"


class DownloadProgress:
    """Reports what huggingface_hub's bars show: bytes, or files where its version counts those alone.

    The bars are updated by several threads; `progress` is called by one at a time. What it raises ends the download.
    """

    def __init__(self, progress: Progress) -> None:
        self._progress, self._lock = progress, Lock()
        self._bars: list[Any] = []
        self._last = 0, 0
        self.error: BaseException | None = None  # what `progress` raised

    def bar_class(self) -> type[Any]:
        """The class of bars to give to huggingface_hub."""
        from tqdm.std import tqdm  # a dependency of huggingface_hub

        report = self

        class Bar(tqdm):  # type: ignore[misc]
            def __init__(self, *args: Any, **options: Any) -> None:
                options.pop("name", None)
                super().__init__(*args, **options | {"file": io.StringIO(), "disable": False})
                report.add(self)

            def display(self, *_: Any, **__: Any) -> bool:
                return True

            def update(self, n: float | None = 1) -> bool | None:
                self.n += n or 0
                report.tell()
                return True

        return Bar

    def add(self, bar: Any) -> None:
        self._bars.append(bar)

    def tell(self) -> None:
        """Report the bar that has come furthest, of those that count bytes if there are any."""
        with self._lock:
            if self.error:
                raise self.error
            bars = [bar for bar in self._bars if bar.unit == BYTES] or self._bars
            bar = max(bars, key=lambda one: int(one.n))
            self._report(int(bar.n), max(int(bar.total or 0), int(bar.n)))

    def finish(self) -> None:
        """Report that all is there, if anything was downloaded."""
        done, total = self._last
        if done < total:
            self._report(total, total)

    def _report(self, done: int, total: int) -> None:
        if (done, total) == self._last or not total:
            return
        self._last = done, total
        try:
            self._progress(STAGE, done, total)
        except BaseException as error:
            self.error = error
            raise
