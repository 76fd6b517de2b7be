"""A link that serves first in, first out at a fixed rate: a transfer's end is known when it is submitted."""

from __future__ import annotations


class FifoLink:
    """Takes `tokens` per transfer and returns when they have passed. `windows` counts the tokens that ended in each
    window of time, for the balance between links."""

    __slots__ = ("free_at", "name", "seconds_per_token", "tokens_total", "up", "window_s", "windows")

    def __init__(self, name: str, tokens_per_s: float, window_s: float) -> None:
        self.name = name
        self.seconds_per_token = 1.0 / tokens_per_s
        self.free_at = 0.0
        self.up = True
        self.window_s = window_s
        self.windows: list[float] = []
        self.tokens_total = 0

    def give(self, tokens: int, now: float) -> float:
        """When these tokens have passed, after all that was submitted before."""
        start = self.free_at if self.free_at > now else now
        end = self.free_at = start + tokens * self.seconds_per_token
        self.tokens_total += tokens
        windows = self.windows
        index = int(end / self.window_s)
        if index >= len(windows):
            windows.extend([0.0] * (index + 1 - len(windows)))
        windows[index] += tokens
        return end

    def forget(self, now: float) -> None:
        """Queued transfers are lost: the link is free, and nothing after `now` counts."""
        self.free_at = now
        del self.windows[int(now / self.window_s) + 1 :]
