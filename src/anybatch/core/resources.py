"""What a stage costs: wall time and peak memory."""

from __future__ import annotations

import threading
import time

import psutil

INTERVAL = 0.02  # seconds between two looks at the memory, of 20 microseconds


class Measure:
    """Context manager that measures wall seconds and the peak resident memory of this process while it is open.

    Sampled from a thread, because the operating system's own peak never goes down. `peak_bytes` is absolute.
    """

    def __init__(self) -> None:
        self.seconds, self.peak_bytes = 0.0, 0

    def __enter__(self) -> Measure:
        self.peak_bytes = resident_bytes()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="anybatch-measure")
        self._started = time.perf_counter()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.seconds = time.perf_counter() - self._started
        self._stop.set()
        self._thread.join()
        self.peak_bytes = max(self.peak_bytes, resident_bytes())

    def _watch(self) -> None:
        while not self._stop.wait(INTERVAL):
            self.peak_bytes = max(self.peak_bytes, resident_bytes())


def resident_bytes() -> int:
    """Resident memory of this process in bytes."""
    return psutil.Process().memory_info().rss
