"""The fence of a sandbox: whose tool calls it still takes. Pure; held by the proxy, outside the sandbox's reach.

A harness that lost its lease, or a session that gave the sandbox away, may still hold a token that is
valid for minutes. The highest epochs seen decide.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from cowhand.wire.tokens import HandClaims


@dataclass(frozen=True)
class FenceRefusal:
    """Why a call is refused.

    Attributes:
        status: 403 for the wrong sandbox or session, 409 for an old epoch.
        type: `wrong_sandbox`, `not_owner` or `fenced`.
        message: what to do.
    """

    status: int
    type: str
    message: str


@dataclass(frozen=True)
class Fence:
    """The newest owner and lease that this sandbox has seen.

    Attributes:
        sandbox_uid: the sandbox itself.
        owner_epoch: epoch of the owner record, 0 for a free sandbox.
        session_id: the owner, empty for a free sandbox.
        epoch: highest lease epoch of that owner.
    """

    sandbox_uid: str
    owner_epoch: int = 0
    session_id: str = ""
    epoch: int = 0

    def check(self, claims: HandClaims) -> Fence | FenceRefusal:
        """Judge verified claims; answers the fence afterwards, or why the call is refused."""
        if claims.sandbox_uid != self.sandbox_uid:
            return FenceRefusal(403, "wrong_sandbox", "The token is for another sandbox.")
        if claims.owner_epoch < self.owner_epoch:
            return FenceRefusal(409, "fenced", "The sandbox has a newer owner; drop this call.")
        if claims.type == "exec":
            return self
        if claims.owner_epoch > self.owner_epoch:
            return replace(
                self,
                owner_epoch=claims.owner_epoch,
                session_id=claims.session_id,
                epoch=claims.epoch,
            )
        if claims.session_id != self.session_id:
            return FenceRefusal(403, "not_owner", "The sandbox belongs to another session.")
        if claims.epoch < self.epoch:
            return FenceRefusal(409, "fenced", "A newer lease of the session has called; stop.")
        return replace(self, epoch=claims.epoch)
