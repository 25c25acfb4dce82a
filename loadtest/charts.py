"""TTFT, TPOT and ITL over time, beside locust's own charts: the page `/latency` of its web UI.

locust's tabs take tables but no charts of one's own, so this is a page that draws by itself, without a library.
"""

from __future__ import annotations

import time
from collections import deque
from pathlib import Path
from typing import Any

import gevent
from flask import Flask, Response, jsonify
from locust.env import Environment

from loadtest.recorded import GOOD, ITL, TPOT, TTFT

INTERVAL_S = 2.0
# An hour; older samples go.
MAX_SAMPLES = 1800
_PERCENTILES = (0.5, 0.9, 0.99)
_PAGE = Path(__file__).with_name("charts.html")


class Charts:
    """Samples the statistics of the process with the web UI: those of all workers, where it is a master."""

    def __init__(self, environment: Environment) -> None:
        self._environment = environment
        self._samples: deque[dict[str, Any]] = deque(maxlen=MAX_SAMPLES)

    def add_to(self, app: Flask) -> None:
        """Adds the page and its data, and begins to sample."""
        app.add_url_rule("/latency", "latency", lambda: Response(_PAGE.read_text(), mimetype="text/html"))
        app.add_url_rule("/latency/data", "latency_data", lambda: jsonify(list(self._samples)))
        self._environment.events.test_start.add_listener(lambda **_: self._samples.clear())
        gevent.spawn(self._sample_forever)

    def _sample_forever(self) -> None:
        while True:
            gevent.sleep(INTERVAL_S)
            if self._environment.runner is not None and self._environment.runner.user_count:
                self._samples.append(self.sample(time.time()))

    def sample(self, now_s: float) -> dict[str, Any]:
        """Percentiles over locust's window (the last 10 s), in ms by quantity and path; requests and good ones a second
        by path."""
        rows: dict[str, dict[str, Any]] = {TTFT: {}, TPOT: {}, ITL: {}, "rate": {}, GOOD: {}}
        for (path, method), entry in list(self._environment.stats.entries.items()):
            if method in (TTFT, TPOT, ITL):
                rows[method][path] = [entry.get_current_response_time_percentile(share) for share in _PERCENTILES]
            else:
                rows[GOOD if method == GOOD else "rate"][path] = entry.current_rps
        return {"at": now_s, **rows}
