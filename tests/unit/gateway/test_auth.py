"""TokenReview and SubjectAccessReview: what is asked, what is refused, how long an answer lives."""

from __future__ import annotations

import pytest

from cowhand.errors import Denied, Unauthenticated
from cowhand.gateway.auth import (
    ACCESS_TTL_S,
    REFUSED_TTL_S,
    TOKEN_TTL_S,
    Authority,
    Expiring,
    Right,
)
from cowhand.kube.errors import KubeUnavailable
from support.gateway_rig import PeopleKube


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def kube():
    return PeopleKube()


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def authority(kube, clock):
    return Authority(kube, clock)


async def test_a_token_for_our_audience_is_somebody(authority, kube):
    caller = await authority.authenticate("Bearer jane-token", None)
    assert (caller.user, caller.groups) == ("jane", ("dev",))
    assert kube.reviews[0]["spec"] == {"token": "jane-token", "audiences": ["cowhand-gateway"]}
    assert caller.actor() == {"user": "jane", "groups": ["dev"], "via": "gateway"}


async def test_the_token_may_come_as_api_key(authority):
    assert (await authority.authenticate(None, "jane-token")).user == "jane"


@pytest.mark.parametrize("header", [None, "", "Bearer ", "Basic amFuZQ==", "jane-token"])
async def test_no_token_is_refused_without_asking(authority, kube, header):
    with pytest.raises(Unauthenticated, match="kubectl create token"):
        await authority.authenticate(header, None)
    assert kube.reviews == []


async def test_an_unknown_token_is_refused(authority):
    with pytest.raises(Unauthenticated, match="does not accept"):
        await authority.authenticate("Bearer nobody", None)


async def test_a_token_for_another_audience_is_refused(authority, kube):
    kube.audience = "https://kubernetes.default.svc"
    with pytest.raises(Unauthenticated):
        await authority.authenticate("Bearer jane-token", None)


async def test_an_answer_without_our_audience_is_refused(authority, kube):
    async def create(manifest):
        return {"status": {"authenticated": True, "user": {"username": "jane"}}}

    kube.create = create
    with pytest.raises(Unauthenticated):
        await authority.authenticate("Bearer jane-token", None)


async def test_token_answers_are_kept_60_seconds(authority, kube, clock):
    for _ in range(3):
        await authority.authenticate("Bearer jane-token", None)
    assert kube.count("TokenReview") == 1
    clock.now += TOKEN_TTL_S
    kube.tokens["jane-token"] = None
    with pytest.raises(Unauthenticated):
        await authority.authenticate("Bearer jane-token", None)


async def test_refusals_are_kept_only_briefly(authority, kube, clock):
    for _ in range(2):
        with pytest.raises(Unauthenticated):
            await authority.authenticate("Bearer late", None)
    assert kube.count("TokenReview") == 1
    kube.tokens["late"] = {"username": "late"}
    clock.now += REFUSED_TTL_S
    assert (await authority.authenticate("Bearer late", None)).user == "late"


async def test_an_api_server_that_is_away_is_not_a_refusal(authority, kube):
    kube.error = KubeUnavailable("away")
    with pytest.raises(KubeUnavailable):
        await authority.authenticate("Bearer jane-token", None)
    kube.error = None
    assert (await authority.authenticate("Bearer jane-token", None)).user == "jane"


async def test_a_right_is_asked_for_by_name(authority, kube):
    caller = await authority.authenticate("Bearer jane-token", None)
    await authority.authorize(caller, Right("get", "events", "default", "fix"))
    spec = kube.reviews[-1]["spec"]
    assert spec["resourceAttributes"] == {
        "group": "cowhand.dev",
        "version": "v1alpha1",
        "resource": "agentsessions",
        "subresource": "events",
        "verb": "get",
        "namespace": "default",
        "name": "fix",
    }
    assert (spec["user"], spec["groups"], spec["uid"]) == ("jane", ["dev"], "1")


async def test_a_refusal_says_what_is_missing(authority):
    caller = await authority.authenticate("Bearer joe-token", None)
    with pytest.raises(Denied) as caught:
        await authority.authorize(caller, Right("create", "approvals", "team-a"))
    assert "joe may not create agentsessions/approvals.cowhand.dev in namespace team-a" in str(
        caught.value
    )


async def test_rights_are_per_user_verb_and_namespace(authority):
    jane = await authority.authenticate("Bearer jane-token", None)
    joe = await authority.authenticate("Bearer joe-token", None)
    await authority.authorize(jane, Right("get", "events", "default"))
    for caller, right in (
        (joe, Right("get", "events", "default")),
        (jane, Right("get", "events", "team-a")),
        (jane, Right("create", "events", "default")),
    ):
        with pytest.raises(Denied):
            await authority.authorize(caller, right)


async def test_a_revoked_right_ends_within_its_time(authority, kube, clock):
    caller = await authority.authenticate("Bearer jane-token", None)
    right = Right("get", "events", "default")
    await authority.authorize(caller, right)
    kube.rights.clear()
    await authority.authorize(caller, right)
    clock.now += ACCESS_TTL_S
    with pytest.raises(Denied):
        await authority.authorize(caller, right)


def test_caches_are_bounded(clock):
    cache = Expiring(clock, limit=3)
    for number in range(10):
        cache.put(number, number, 60)
    assert len(cache) == 3
    assert [cache.get(number) for number in (6, 7, 8, 9)] == [None, 7, 8, 9]
