"""The budget for transmits: at which rate the kernel samples connections, so that not too many transmits pass.

The kernel captures one in `rate` connections, a power of two (bpf/sample.h), different ones in each turn. So each is
captured for one turn in `rate`, and sums over that many turns lack no connection. Retransmissions and records of
connections are never sampled by it.
"""

from dataclasses import dataclass

MOST_RATE = 1 << 16
_TURN_S = 0.9
_CALM_S = 30.0
"""The rate falls by half only after it would have been enough for this long."""
_CALM_SHARE = 0.8
"""Of the budget: what half the rate may use at most."""
_WINDOW_S = 16.0
_TOLERANCE = 1.1
"""The mean may be this much above the budget: it varies with the connections that have their turn, and a tenth too many
events is better than half of them."""
_BURST = 2.0
"""More than this times the budget in one turn raises the rate at once."""


@dataclass(slots=True)
class TransmitBudget:
    """Chooses the rate for a budget of `events_per_s`; 0: no budget. Call `follow` about once a second."""

    events_per_s: int
    rate: int = 1
    turn: int = 0
    _mean: float = 0.0
    """Transmits per second that pass, averaged over about _WINDOW_S."""
    _last: tuple[float, int] | None = None
    _calm_since_s: float = 0.0

    def set(self, events_per_s: int) -> None:
        """Follow another budget from now on; the rate starts where it is, or at 1 without a budget."""
        if events_per_s == self.events_per_s:
            return
        self.events_per_s, self._last = events_per_s, None
        if not events_per_s:
            self.rate = 1

    def follow(self, now_s: float, passed: int) -> bool:
        """Take the count of transmits that have passed so far; return whether `rate` and `turn` are new."""
        if self._last is None:  # the kernel may have the rate of an earlier process or budget
            self._last, self._calm_since_s = (now_s, passed), now_s
            return True
        elapsed_s = now_s - self._last[0]
        if not self.events_per_s or elapsed_s < _TURN_S:
            return False
        self._adapt(now_s, elapsed_s, (passed - self._last[1]) / elapsed_s)
        self._last = (now_s, passed)
        self.turn = (self.turn + 1) % (1 << 32)
        return True

    def _adapt(self, now_s: float, elapsed_s: float, passed_per_s: float) -> None:
        self._mean += (passed_per_s - self._mean) * min(elapsed_s / _WINDOW_S, 1)
        if passed_per_s > _BURST * self.events_per_s:
            self._mean = max(self._mean, passed_per_s)
        while self._mean > _TOLERANCE * self.events_per_s and self.rate < MOST_RATE:
            self._change(now_s, 2)
        if self.rate == 1 or 2 * self._mean > _CALM_SHARE * self.events_per_s:
            self._calm_since_s = now_s
        elif now_s - self._calm_since_s >= _CALM_S:
            self._change(now_s, 0.5)

    def _change(self, now_s: float, factor: float) -> None:
        """Multiply the rate, and divide what is expected to pass."""
        self.rate = int(self.rate * factor)
        self._mean /= factor
        self._calm_since_s = now_s
