"""The fence as a table, and what must hold for any sequence of calls."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cowhand.proxy.fence import Fence, FenceRefusal
from cowhand.wire.tokens import HandClaims

A, B = "sesn_a", "sesn_b"
FENCE = Fence("box", 2, A, 5)


def claims(
    own: int = 2, ses: str = A, epo: int = 5, typ: str = "hand", sbx: str = "box"
) -> HandClaims:
    return HandClaims(sbx, ses, own, epo, 0, 1, typ)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("call", "after"),
    [
        (claims(), FENCE),
        (claims(epo=6), Fence("box", 2, A, 6)),
        (claims(own=3, ses=B, epo=1), Fence("box", 3, B, 1)),
        (claims(epo=0, typ="exec"), FENCE),
        (claims(ses=B, epo=9, typ="exec"), FENCE),
        (claims(own=9, ses=B, typ="exec"), FENCE),
    ],
)
def test_calls_that_pass(call: HandClaims, after: Fence) -> None:
    assert FENCE.check(call) == after


@pytest.mark.parametrize(
    ("call", "status", "kind"),
    [
        (claims(epo=4), 409, "fenced"),
        (claims(own=1, epo=99), 409, "fenced"),
        (claims(own=1, typ="exec"), 409, "fenced"),
        (claims(ses=B, epo=99), 403, "not_owner"),
        (claims(sbx="other", own=99), 403, "wrong_sandbox"),
        (claims(sbx="other", typ="exec"), 403, "wrong_sandbox"),
    ],
)
def test_calls_that_are_refused(call: HandClaims, status: int, kind: str) -> None:
    verdict = FENCE.check(call)
    assert isinstance(verdict, FenceRefusal)
    assert (verdict.status, verdict.type) == (status, kind)


def test_a_free_sandbox_takes_no_tool_call() -> None:
    free = Fence("box")
    assert isinstance(free.check(claims(own=0, epo=0)), FenceRefusal)
    assert free.check(claims(own=0, ses="", epo=0, typ="exec")) == free


CALLS = st.builds(
    claims,
    own=st.integers(0, 4),
    ses=st.sampled_from([A, B]),
    epo=st.integers(0, 4),
    typ=st.sampled_from(["hand", "exec"]),
)


@given(st.lists(CALLS, max_size=30))
def test_the_fence_never_goes_back(calls: list[HandClaims]) -> None:
    fence = Fence("box")
    for call in calls:
        verdict = fence.check(call)
        if isinstance(verdict, Fence):
            assert (verdict.owner_epoch, verdict.epoch) >= (fence.owner_epoch, fence.epoch) or (
                verdict.owner_epoch > fence.owner_epoch
            )
            assert verdict.owner_epoch != fence.owner_epoch or (
                verdict.session_id == fence.session_id
            )
            fence = verdict
