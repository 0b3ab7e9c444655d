"""How an episode ended, by the word of the operator beside the robot: real robots cannot tell.

`say` ends the running episode of this process; nothing said before it began counts.
"""

from dataclasses import dataclass
from typing import Literal

Reason = Literal["success", "failure", "discarded"]

KEYS: dict[str, Reason] = {"s": "success", "f": "failure", "d": "discarded"}


@dataclass(frozen=True)
class Verdict:
    """reason: as it is recorded; `discarded` says that the episode is worth nothing, and nothing of its outcome."""

    reason: Reason

    @property
    def success(self) -> bool | None:
        return {"success": True, "failure": False, "discarded": None}[self.reason]


class EpisodeJudged(Exception):
    """The operator has ended the running episode."""

    def __init__(self, verdict: Verdict) -> None:
        super().__init__(verdict.reason)
        self.verdict = verdict


_said: Verdict | None = None
"""Of the process, as there is one operator at one terminal; a plain attribute, set from any thread."""


def say(reason: Reason) -> None:
    """End the running episode so. The last word counts."""
    global _said
    _said = Verdict(reason)


def begin() -> None:
    """An episode begins: forget what was said before."""
    global _said
    _said = None


def check() -> None:
    """Raise EpisodeJudged when the operator has spoken."""
    if _said is not None:
        raise EpisodeJudged(_said)
