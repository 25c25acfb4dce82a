"""Where a request goes: candidates -> filters -> scorers -> picker -> a decision that keeps every term. Pure."""

from router.policy.candidate import Candidate, LinkFacts, LoadView, Need, Phase, Role, Speed
from router.policy.candidates import Candidates, Snapshot
from router.policy.decision import Considered, Decision, Rejected
from router.policy.policies import POLICIES, Policy
from router.policy.roster import Links, Roster

__all__ = [
    "POLICIES",
    "Candidate",
    "Candidates",
    "Considered",
    "Decision",
    "LinkFacts",
    "Links",
    "LoadView",
    "Need",
    "Phase",
    "Policy",
    "Rejected",
    "Role",
    "Roster",
    "Snapshot",
    "Speed",
]
