"""A line on stderr that says how far, how fast and how long still."""

import sys
import time


class Progress:
    """`with Progress("encoding", total_bytes) as progress: progress.update(bytes_done)`.

    On a terminal one line is rewritten twice a second; in a log a new line every 30 seconds.
    """

    def __init__(self, title: str, total: int):
        self._title, self._total = title, max(1, total)
        self._terminal = sys.stderr.isatty()
        self._interval = 0.5 if self._terminal else 30.0
        self._started = self._shown = time.monotonic()
        self._first: int | None = None  # where a resumed work begins

    def __enter__(self) -> "Progress":
        if self._terminal:
            print(f"\r\x1b[K{self._title}", end="", file=sys.stderr, flush=True)
        return self

    def __exit__(self, *_) -> None:
        if self._terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    def update(self, done: int) -> None:
        """`done` of the total is done, counted from the beginning."""
        now = time.monotonic()
        if self._first is None:
            self._first = done
        if now - self._shown < self._interval:
            return
        self._shown = now
        rate = (done - self._first) / (now - self._started)
        left = clock((self._total - done) / rate) if rate else "?"
        line = (
            f"{self._title}: {done / self._total:.0%} of {self._total / 1e6:.0f} MB"
            f" · {rate / 1e6:.1f} MB/s · {left} left"
        )
        end = "" if self._terminal else "\n"
        start = "\r\x1b[K" if self._terminal else ""
        print(f"{start}{line}", end=end, file=sys.stderr, flush=True)


def clock(seconds: float) -> str:
    """Like 1:02:03 or 2:03."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
