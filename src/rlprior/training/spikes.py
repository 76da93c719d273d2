"""Loss spikes: steps whose loss stands out of the steps before."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping
from typing import Any

WINDOW_STEPS = 100
NUM_DEVIATIONS = 4.0


class SpikeCounter:
    """Counts the steps t with loss_t > m + 4 s, where m and s are mean and standard deviation of the 100 losses before.

    s is the population's (division by 100). Losses that are not finite are no spikes and left out of the window: those steps are skipped and
    counted as such. Nothing is counted before the window is full. A spike enters the window as any loss does.
    """

    def __init__(self) -> None:
        """Nothing seen yet."""
        self.num_spikes = 0
        self._window: deque[float] = deque(maxlen=WINDOW_STEPS)

    def add(self, loss: float) -> None:
        """The loss of the next step."""
        if not math.isfinite(loss):
            return
        if len(self._window) == WINDOW_STEPS:
            mean = statistics.fmean(self._window)
            deviation = math.sqrt(statistics.fmean((each - mean) ** 2 for each in self._window))
            self.num_spikes += loss > mean + NUM_DEVIATIONS * deviation
        self._window.append(loss)

    @property
    def state(self) -> dict[str, Any]:
        """What a checkpoint has to keep, so that a run that is gone on with counts the same."""
        return {"num_spikes": self.num_spikes, "recent_losses": list(self._window)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint's `state`."""
        self.num_spikes = state["num_spikes"]
        self._window.extend(state["recent_losses"])
