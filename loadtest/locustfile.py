"""`locust -f loadtest/locustfile.py --host http://127.0.0.1:8000 [CompletionUser ChatUser ReplayUser]`.

Each user is an open-loop source of `--rate` requests a second: it sends when a request is due, whatever the server
does. Sources that are Poisson add up to one that is, so N users on any number of machines are a Poisson process of
N times that rate. A trace is one user, for its bursts are not to be thinned.

Beside each request, statistics have a row each for TTFT, TPOT and ITL, and GOOD, whose rate is the goodput if `--ttft`
and `--tpot` say what is good. The totals count requests alone. `/latency` in the web UI draws them.
"""

from __future__ import annotations

import random
import time
from argparse import ArgumentParser, Namespace
from typing import Any

import gevent
from gevent.pool import Group
from locust import User, events, task
from locust.env import Environment

from loadtest.charts import Charts
from loadtest.client import ask_blocking
from loadtest.options import add_workload_options, workload_of
from loadtest.outcome import Outcome
from loadtest.recorded import record
from loadtest.session import Session, request_of
from loadtest.target import find_target
from pdserve.slo import Slo


@events.init_command_line_parser.add_listener
def _(parser: ArgumentParser) -> None:
    parser.add_argument("--rate", type=float, default=0.5, help="requests a second of each user")
    parser.add_argument("--model", help="the first that the host lists")
    parser.add_argument("--api-key", env_var="OPENAI_API_KEY", include_in_web_ui=False, help="sent as a bearer token")
    parser.add_argument("--request-timeout", type=float, default=60.0, help="seconds after which a request has failed")
    parser.add_argument("--ttft", type=float, help="objective in seconds")
    parser.add_argument("--tpot", type=float, help="objective in seconds")
    add_workload_options(parser)


@events.init.add_listener
def _(environment: Environment, **_: Any) -> None:
    options = environment.parsed_options
    if options is not None and not options.trace and ReplayUser in environment.user_classes:
        environment.user_classes.remove(ReplayUser)
    if environment.web_ui is not None and environment.web_ui.app is not None:
        Charts(environment).add_to(environment.web_ui.app)


class SourceUser(User):
    """Sends the sessions of `kind` at the user's own rate, each on a greenlet."""

    abstract = True
    kind = ""

    def on_start(self) -> None:
        self._options: Namespace = self.environment.parsed_options
        self._target = find_target(self.host or self.environment.host, self._options.model, self._options.api_key)
        self._slo = Slo(self._options.ttft, self._options.tpot) if self._options.ttft and self._options.tpot else None
        self._in_flight = Group()

    def on_stop(self) -> None:
        """What has not ended is not counted, as with every user of locust that is stopped."""
        self._in_flight.kill()

    @task
    def send(self) -> None:
        workload = workload_of(self.kind, self._options)
        began_s = time.monotonic()
        # Drawn, so that no two users on any machine have the same prompts.
        for session in workload.sessions(self._options.rate, random.SystemRandom().getrandbits(62)):
            gevent.sleep(max(0.0, began_s + session.at_s - time.monotonic()))
            self._in_flight.spawn(self._converse, session)

    def _converse(self, session: Session) -> None:
        outcomes: list[Outcome] = []
        for number, turn in enumerate(session.turns):
            gevent.sleep(turn.think_s)
            request = request_of(session, number, [outcome.text for outcome in outcomes])
            outcomes.append(ask_blocking(self._target, request.path, request.body, self._options.request_timeout))
            record(self.environment, request.path, outcomes[-1], self._slo)
            if not outcomes[-1].ok:
                return


class CompletionUser(SourceUser):
    kind = "synthetic"


class ChatUser(SourceUser):
    kind = "chat"


class ReplayUser(SourceUser):
    kind = "replay"
    fixed_count = 1
