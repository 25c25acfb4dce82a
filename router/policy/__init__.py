"""Where a request goes: candidates -> filters -> scorers -> picker -> a decision that keeps every term. Pure."""

from router.policy.candidate import Candidate, LinkFacts, LoadView, Need, Phase, Role, Speed
from router.policy.decision import Considered, Decision, Rejected
from router.policy.policies import POLICIES, Policy

__all__ = [
    "POLICIES",
    "Candidate",
    "Considered",
    "Decision",
    "LinkFacts",
    "LoadView",
    "Need",
    "Phase",
    "Policy",
    "Rejected",
    "Role",
    "Speed",
]
