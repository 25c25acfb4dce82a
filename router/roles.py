"""Another role for a worker that runs: asked for by an operator or by `router.balance`, carried out by the worker."""

from __future__ import annotations

import grpc

from pdserve.errors import Conflict, InvalidRequest, Overloaded, UnknownWorker
from pdserve.protocol import worker_pb2 as pb
from router.fleet import Fleet
from router.member import Member
from router.policy import Role

DRAIN_S = 30.0  # then what is left moves to other workers

_TO_PROTO = {Role.PREFILL: pb.PREFILL, Role.DECODE: pb.DECODE, Role.MIXED: pb.MIXED}


class RoleChanger:
    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    async def change(
        self, worker_id: str, role: Role, *, drain_s: float = DRAIN_S, force: bool = False
    ) -> pb.RoleReport:
        """Begin to drain the worker, which then takes the role; returns at once. Of one that has it, nothing changes.

        Args:
            force: even if nobody else has the worker's present role.

        Raises:
            UnknownWorker: no worker has said hello under this name.
            Conflict: it is the last one of its role, or is changing to yet another role.
            Overloaded: it is not reached.
            InvalidRequest: `drain_s` is out of range.
        """
        member = self._fleet.named(worker_id)
        if member is None:
            raise UnknownWorker(f"No worker is named '{worker_id[:64]}'.")
        if not force and member.takes_requests and (why := self._lacks_after(member, role)):
            raise Conflict(f"{why} Send 'force': true to change it all the same.", code="last_of_role")
        try:
            report = await member.link.change_role(pb.ChangeRoleRequest(role=_TO_PROTO[role], drain_s=drain_s))
        except ConnectionError as error:
            raise _unreachable(member, str(error)) from error
        except grpc.aio.AioRpcError as error:
            sentence = f"{worker_id} refuses: {error.details()}."
            if error.code() is grpc.StatusCode.FAILED_PRECONDITION:
                raise Conflict(sentence, code="role_changes_already") from error
            if error.code() is grpc.StatusCode.INVALID_ARGUMENT:
                raise InvalidRequest(sentence) from error
            raise _unreachable(member, error.details() or error.code().name) from error
        return report  # its session says so too, and what comes after it: that counts

    def _lacks_after(self, member: Member, role: Role) -> str:
        """What the fleet would lack; empty when it is nothing."""
        if role is member.role:
            return ""
        others = {each.role for each in self._fleet.in_use() if each is not member}
        if not others:
            return f"{member.worker_id} is the only worker that takes requests: none could be served while it drains."
        if member.role is Role.MIXED or {member.role, Role.MIXED} & {*others, role}:
            return ""
        return f"{member.worker_id} is the last {member.role.value} worker: the others would serve whole requests."


def _unreachable(member: Member, reason: str) -> Overloaded:
    return Overloaded(f"{member.worker_id} is not reached: {reason}.", code="worker_unreachable")
