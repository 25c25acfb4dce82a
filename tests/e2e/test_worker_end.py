"""A worker that is told to end does so in bounded time and without a crash, whatever it is doing."""

from __future__ import annotations

import signal
import time

import pytest

from tests.e2e.conftest import MakeStack
from tests.support.passages import Encode, passage_tokens
from tests.support.stack import metric, wait_for

pytestmark = pytest.mark.e2e

END_S = 20.0  # on a busy machine; `pdserve up` waits 3 s


def test_in_the_middle_of_a_step_that_takes_longer_than_ending(make_stack: MakeStack, encode: Encode) -> None:
    """The whole prompt is one step, of seconds."""
    with make_stack("--max-batched-tokens", "4096", fresh=True, mixed=1) as stack:
        [worker] = stack.living
        with stack.client.send({"prompt": passage_tokens(encode, 700, 4000)}):
            asked = f"{stack.url}/metrics"
            wait_for(lambda: metric(asked, "pdserve_router_active_requests") > 0, END_S, lambda: "it does not begin")
            time.sleep(0.2)  # on its way to the worker
            worker.process.send_signal(signal.SIGTERM)
            assert worker.process.wait(END_S) == 0, stack.log(worker.worker_id)
