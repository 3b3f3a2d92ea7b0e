"""When to stop before the last step: a signal reached one of the ranks, or the time is up."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fastelectra.training import launch

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # the last is schedulers' warning
TIME_UP, NOT_SAVED = 100, 101  # reasons beside the numbers of signals


class Stop:
    """Agrees among all ranks on the step after which to stop.

    max_hours: since the process started; None: no limit.
    """

    def __init__(self, max_hours: float | None = None):
        self.max_hours, self._signal, self._at = max_hours, 0, 0.0
        self._group = torch.distributed.new_group(backend="gloo")  # on the host: no GPU waits

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Note the first signal; the second ends the process at once.

        In a thread: Python's handlers run between two steps of the main thread, which may be
        waiting for a rank that does not answer.
        """
        heard, told = os.pipe()
        os.set_blocking(told, False)
        listener = threading.Thread(target=self._note, args=(heard,), daemon=True)
        listener.start()
        outer = signal.set_wakeup_fd(told)
        before = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
        try:
            yield
        finally:
            signal.set_wakeup_fd(outer)
            os.write(told, b"\0")
            listener.join()  # or it may be the last to hold the group, and abort the exit with it
            os.close(told)
            os.close(heard)
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, heard: int) -> None:
        """`heard` gives the number of each signal, a byte, and 0 to end."""
        while number := os.read(heard, 1)[0]:
            if self._signal and time.monotonic() > self._at + launch.FORWARDED:
                os._exit(128 + number)
            if not self._signal:
                self._signal, self._at = number, time.monotonic()
                launch.stopping.set()

    def agreed(self, failed: bool = False) -> str:
        """Why all ranks are to stop now; empty: they go on. All ranks call it after each step.

        failed: whether a checkpoint of this rank's could not be written.
        """
        reason = NOT_SAVED if failed else self._signal
        if self.max_hours and launch.seconds_since_start() > 3600 * self.max_hours:
            reason = max(reason, TIME_UP)
        if torch.distributed.get_world_size() > 1:
            shared = torch.tensor(reason)
            torch.distributed.all_reduce(shared, torch.distributed.ReduceOp.MAX, self._group)
            reason = int(shared)
        if reason == TIME_UP:
            return f"--max-hours {self.max_hours:g} have passed"
        if reason == NOT_SAVED:
            return "a checkpoint could not be written"
        return f"{signal.Signals(reason).name} was received" if reason else ""
