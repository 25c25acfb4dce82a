"""Who serves a component now, by discovery, which is asked once a second.

What discovery does not know (Redis is down) changes nothing; an instance that it no longer lists is gone.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

from pdserve.client.errors import NoInstances, NotStarted, UnknownInstance
from pdserve.discovery import Discovery, Endpoint
from pdserve.protocol import COMPONENT_PROTOCOL_VERSION

log = logging.getLogger(__name__)

POLL_S = 1.0
OnChange = Callable[[Sequence[Endpoint]], None]


class Instances:
    def __init__(self, discovery: Discovery) -> None:
        self._discovery = discovery
        self._listed: dict[str, Endpoint] = {}
        self._known = True  # discovery answered last time
        self._changed = asyncio.Condition()
        self._watchers: list[OnChange] = []

    @property
    def usable(self) -> tuple[Endpoint, ...]:
        """By id; those that speak another protocol version are left out."""
        return tuple(each for _, each in sorted(self._listed.items()) if _speaks_ours(each))

    @property
    def addresses(self) -> set[str]:
        return {each.address for each in self._listed.values()}

    @property
    def doubt(self) -> str:
        """For the end of a sentence about who is missing."""
        return "" if self._known else ": Redis does not answer"

    def some(self) -> tuple[Endpoint, ...]:
        """At least one. Raises NoInstances."""
        usable = self.usable
        if not usable:
            others = "; ".join(map(_other_version, self._listed.values()))
            raise NoInstances(others or f"no instance of this component is listed{self.doubt}")
        return usable

    def one(self, instance_id: str) -> Endpoint:
        """Raises UnknownInstance; NotStarted if it speaks another protocol version."""
        found = self._listed.get(instance_id)
        if found is None:
            raise UnknownInstance(f"no instance {instance_id} is listed{self.doubt}")
        if not _speaks_ours(found):
            raise NotStarted(_other_version(found))
        return found

    def watch(self, on_change: OnChange) -> None:
        self._watchers.append(on_change)

    async def poll(self) -> None:
        listed = await self._discovery.poll()
        self._known = listed is not None
        if listed is None:
            return
        new = {each.endpoint_id: each for each in listed}
        if new == self._listed:
            return
        for name in sorted(new.keys() - self._listed.keys()):
            if not _speaks_ours(new[name]):
                log.warning("not called: %s", _other_version(new[name]))
        self._listed = new
        async with self._changed:
            self._changed.notify_all()
        for on_change in self._watchers:
            try:
                on_change(self.usable)
            except Exception:
                log.exception("a watcher of instances failed")

    async def wait_for(self, count: int) -> None:
        async with self._changed:
            await self._changed.wait_for(lambda: len(self.usable) >= count)


def _speaks_ours(instance: Endpoint) -> bool:
    return instance.protocol_version in (0, COMPONENT_PROTOCOL_VERSION)


def _other_version(instance: Endpoint) -> str:
    return (
        f"instance {instance.endpoint_id} speaks protocol version {instance.protocol_version}, "
        f"this client {COMPONENT_PROTOCOL_VERSION}"
    )
