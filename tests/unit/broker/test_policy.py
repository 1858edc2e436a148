"""Every decision of the broker as a table."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest

from cowhand.broker import policy
from cowhand.broker.policy import Registration
from cowhand.kube.review import Caller, Refusal, caller_of, check_pod_account
from cowhand.session.log import HandRecord, SessionMeta, SessionState

SESSION = "sesn_" + "a" * 32
POD = Caller("system:serviceaccount:team:cowhand-sandbox", "team", "cowhand-sandbox", "p-1", "box")
WORKER = Caller("system:serviceaccount:team:cowhand-harness", "team", "cowhand-harness", "w-1", "h")
ASKED = Registration(8443, "ab" * 32)


def review(**changes: Any) -> dict[str, Any]:
    status: dict[str, Any] = {
        "authenticated": True,
        "audiences": ["cowhand-broker"],
        "user": {
            "username": POD.user,
            "extra": {
                "authentication.kubernetes.io/pod-uid": ["p-1"],
                "authentication.kubernetes.io/pod-name": ["box"],
            },
        },
    }
    return status | changes


def test_a_caller_is_what_the_review_says() -> None:
    assert caller_of(review(), "cowhand-broker") == POD


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"authenticated": False}, "unauthenticated"),
        ({"authenticated": "true"}, "unauthenticated"),
        ({"audiences": []}, "unauthenticated"),
        ({"audiences": None}, "unauthenticated"),
        ({"audiences": ["https://kubernetes.default.svc"]}, "unauthenticated"),
        ({"user": {"username": "ada@example.com"}}, "forbidden"),
        ({"user": {"username": "system:serviceaccount:team"}}, "forbidden"),
        ({"user": {"username": "system:serviceaccount:team:a:b"}}, "forbidden"),
        ({"user": {}}, "forbidden"),
    ],
    ids=str,
)
def test_reviews_that_make_no_caller(changes: dict[str, Any], kind: str) -> None:
    found = caller_of(review(**changes), "cowhand-broker")
    assert isinstance(found, Refusal)
    assert found.type == kind


@pytest.mark.parametrize(
    ("changes", "fits"),
    [
        ({}, True),
        ({"account": "cowhand-harness"}, False),
        ({"namespace": "elsewhere"}, False),
        ({"pod_uid": ""}, False),
        ({"pod_name": ""}, False),
    ],
    ids=str,
)
def test_a_pod_account(changes: dict[str, str], fits: bool) -> None:
    caller = dataclasses.replace(POD, **changes)
    assert (check_pod_account(caller, "cowhand-sandbox", ["team"]) is None) is fits


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"port": "8443", "cert_sha256": "ab" * 32},
        {"port": 0, "cert_sha256": "ab" * 32},
        {"port": 65536, "cert_sha256": "ab" * 32},
        {"port": True, "cert_sha256": "ab" * 32},
        {"port": 8443, "cert_sha256": "AB" * 32},
        {"port": 8443, "cert_sha256": "ab"},
        {"port": 8443, "cert_sha256": None},
    ],
    ids=str,
)
def test_bad_registrations(body: dict[str, Any]) -> None:
    found = policy.registration_of(body)
    assert isinstance(found, Refusal)
    assert found.type == "invalid"


def pod() -> dict[str, Any]:
    return {
        "metadata": {
            "name": "box",
            "namespace": "team",
            "uid": "p-1",
            "labels": {
                "cowhand.dev/session-id": SESSION,
                "cowhand.dev/hand": "main",
                "cowhand.dev/instance": "2",
            },
            "ownerReferences": [
                {
                    "apiVersion": "cowhand.dev/v1alpha1",
                    "kind": "Sandbox",
                    "name": "box",
                    "uid": "s-1",
                    "controller": True,
                }
            ],
        },
        "spec": {"serviceAccountName": "cowhand-sandbox"},
        "status": {"podIP": "10.0.0.9", "podIPs": [{"ip": "10.0.0.9"}, {"ip": "fd00::9"}]},
    }


def sandbox() -> dict[str, Any]:
    return {
        "metadata": {"name": "box", "namespace": "team", "uid": "s-1"},
        "spec": {"holder": {"sessionID": SESSION, "hand": "main", "instance": 2}},
    }


def record(**changes: Any) -> HandRecord:
    plain = HandRecord(
        SESSION,
        "main",
        2,
        "Ready",
        sandbox="box",
        sandbox_uid="s-1",
        pod_uid="p-1",
        address="10.0.0.9:8443",
        cert_sha256="ab" * 32,
        owner=SESSION,
        owner_epoch=1,
    )
    return dataclasses.replace(plain, **changes)


def test_a_registration_makes_a_record() -> None:
    assert policy.hand_record(pod(), sandbox(), "10.0.0.9", ASKED, None) == record()
    mapped = policy.hand_record(pod(), sandbox(), "::ffff:10.0.0.9", ASKED, None)
    assert mapped == record()
    six = policy.hand_record(pod(), sandbox(), "fd00:0::9", ASKED, None)
    assert six == record(address="[fd00::9]:8443")


def test_a_sandbox_without_holder_belongs_to_nobody() -> None:
    bare, free = pod(), sandbox()
    bare["metadata"]["labels"] = {}
    free["spec"] = {}
    made = policy.hand_record(bare, free, "10.0.0.9", ASKED, None)
    assert made == record(session_id="", hand="", instance=0, owner="", owner_epoch=0)


def test_a_transfer_survives_a_restart_of_the_proxy() -> None:
    moved = record(owner="sesn_" + "c" * 32, owner_epoch=3, cert_sha256="cd" * 32)
    made = policy.hand_record(pod(), sandbox(), "10.0.0.9", ASKED, moved)
    assert made == record(owner="sesn_" + "c" * 32, owner_epoch=3)


def change(target: Any, path: str, value: Any) -> None:
    *way, last = path.split("/")
    for key in way:
        target = target[int(key)] if isinstance(target, list) else target[key]
    target[last] = value


@pytest.mark.parametrize(
    ("which", "path", "value"),
    [
        ("pod", "metadata/ownerReferences", []),
        ("pod", "metadata/ownerReferences/0/controller", False),
        ("pod", "metadata/ownerReferences/0/kind", "ReplicaSet"),
        ("pod", "metadata/ownerReferences/0/apiVersion", "agents.x-k8s.io/v1alpha1"),
        ("pod", "metadata/ownerReferences/0/uid", "s-2"),
        ("pod", "metadata/name", "box-2"),
        ("pod", "metadata/labels/cowhand.dev~1session-id", "sesn_" + "b" * 32),
        ("pod", "metadata/labels", {}),
        ("pod", "status", {}),
        ("pod", "status", {"podIP": "10.0.0.8"}),
        ("sandbox", "metadata/uid", "s-2"),
        ("sandbox", "spec", {}),
        ("sandbox", "spec/holder/instance", 3),
        ("sandbox", "spec/holder/hand", "other"),
    ],
)
def test_pods_that_may_not_register(which: str, path: str, value: Any) -> None:
    objects = {"pod": copy.deepcopy(pod()), "sandbox": copy.deepcopy(sandbox())}
    if "~1" in path:
        objects["pod"]["metadata"]["labels"]["cowhand.dev/session-id"] = value
    else:
        change(objects[which], path, value)
    found = policy.hand_record(objects["pod"], objects["sandbox"], "10.0.0.9", ASKED, None)
    assert isinstance(found, Refusal)
    assert found.type == "forbidden"


def test_more_pods_that_may_not_register() -> None:
    for peer in ("10.0.0.8", "127.0.0.1", "", "not an address"):
        assert isinstance(policy.hand_record(pod(), sandbox(), peer, ASKED, None), Refusal)
    assert isinstance(policy.hand_record(pod(), None, "10.0.0.9", ASKED, None), Refusal)
    lost = record(state="Lost")
    assert isinstance(policy.hand_record(pod(), sandbox(), "10.0.0.9", ASKED, lost), Refusal)


@pytest.mark.parametrize("what", ["gone", "another", "account"])
def test_the_pod_of_a_token_must_be_there(what: str) -> None:
    there: dict[str, Any] | None = pod()
    assert policy.check_pod(POD, there) is None
    if what == "gone":
        there = None
    elif what == "another":
        change(pod_ := pod(), "metadata/uid", "p-2")
        there = pod_
    else:
        change(pod_ := pod(), "spec/serviceAccountName", "default")
        there = pod_
    assert isinstance(policy.check_pod(POD, there), Refusal)


def state(lease: str = "7:w-1.00aa:n", namespace: str = "team") -> SessionState:
    meta = SessionMeta(SESSION, namespace, "n", "u", {})
    return SessionState(meta, "running", "running", lease, 7, 9, {}, 0)


@pytest.mark.parametrize(
    ("lease", "held", "namespace", "want"),
    [
        ("7:w-1.00aa:n", "7:w-1.00aa:n", "team", 7),
        ("7:w-1.00aa:n", "8:w-1.00aa:m", "team", None),
        ("7:w-1.00aa:n", "", "team", None),
        ("", "", "team", None),
        ("7:w-1.00aa:n", "7:w-1.00aa:n", "rivals", None),
        ("7:w-2.00aa:n", "7:w-2.00aa:n", "team", None),
        ("7:w-12.00aa:n", "7:w-12.00aa:n", "team", None),
        ("7:w-1", "7:w-1", "team", None),
        ("x:w-1.00aa:n", "x:w-1.00aa:n", "team", None),
    ],
)
def test_a_lease_counts_only_for_its_worker(
    lease: str, held: str, namespace: str, want: int | None
) -> None:
    found = policy.lease_epoch(WORKER, state(held, namespace), lease)
    assert found == want if want is not None else isinstance(found, Refusal)


@pytest.mark.parametrize(
    ("found", "kind"),
    [
        (None, "not_found"),
        (record(state="Lost"), "not_found"),
        (record(state="Pending"), "not_found"),
        (record(owner=""), "forbidden"),
        (record(owner="sesn_" + "b" * 32), "forbidden"),
        (record(owner_epoch=0), "forbidden"),
    ],
)
def test_hands_that_are_not_the_sessions(found: HandRecord | None, kind: str) -> None:
    verdict = policy.owned_hand(found, SESSION)
    assert isinstance(verdict, Refusal)
    assert verdict.type == kind
    assert policy.owned_hand(record(), SESSION) == record()


def test_only_the_gateway_gets_exec_tokens() -> None:
    gateway = "system:serviceaccount:cowhand-system:cowhand-gateway"
    caller = Caller(gateway, "cowhand-system", "cowhand-gateway", "", "")
    body = {"namespace": "team", "sandbox_uid": "s-1", "actor": "ada"}
    asked = policy.exec_request(caller, body, gateway, ["team"])
    assert asked == policy.ExecRequest("team", "s-1", "ada")
    others = [WORKER, POD, dataclasses.replace(caller, user=gateway.replace("system:cow", "x:cow"))]
    for other in others:
        assert isinstance(policy.exec_request(other, body, gateway, ["team"]), Refusal)
    for wrong in ({"namespace": "rivals"}, {"actor": ""}, {"sandbox_uid": 3}, {"actor": "x" * 600}):
        assert isinstance(policy.exec_request(caller, body | wrong, gateway, ["team"]), Refusal)


@pytest.mark.parametrize(
    ("url", "annotation", "fits"),
    [
        ("https://api.anthropic.com", "api.anthropic.com", True),
        ("https://api.anthropic.com/", " API.anthropic.com , other", True),
        ("https://api.anthropic.com", "api.anthropic.com:443", True),
        ("https://api.anthropic.com:8443", "api.anthropic.com:443", False),
        ("http://model.team.svc:8080", "model.team.svc:8080", True),
        ("https://model.team.svc:8080", "model.team.svc", True),
        ("http://model.team.svc", "model.team.svc:80", True),
        # The key in the clear, for who forges the base URL in the store.
        ("http://model.team.svc:8080", "model.team.svc", False),
        ("http://api.anthropic.com", "api.anthropic.com", False),
        ("http://api.anthropic.com", "api.anthropic.com:443", False),
        ("http://api.anthropic.com:443", "api.anthropic.com:443", False),
        ("https://[fd00::1]:443", "[fd00::1]:443", True),
        ("https://api.anthropic.com.evil.com", "api.anthropic.com", False),
        ("https://evil-api.anthropic.com", "api.anthropic.com", False),
        ("https://anthropic.com", "*.anthropic.com", False),
        ("https://api.anthropic.com@evil.com", "api.anthropic.com", False),
        ("https://evil.com/api.anthropic.com", "api.anthropic.com", False),
        ("https://evil.com?api.anthropic.com", "api.anthropic.com", False),
        ("ftp://api.anthropic.com", "api.anthropic.com", False),
        ("api.anthropic.com", "api.anthropic.com", False),
        ("https://api.anthropic.com:99999", "api.anthropic.com", False),
        ("https://api.anthropic.com", "", False),
    ],
)
def test_hosts_that_a_secret_may_go_to(url: str, annotation: str, fits: bool) -> None:
    assert (policy.check_allowed_host(url, "s", annotation) is None) is fits


@pytest.mark.parametrize(
    "body",
    [{}, {"session_id": SESSION}, {"session_id": "x", "lease": "l"}, {"lease": 3}],
    ids=str,
)
def test_sessions_must_be_named_rightly(body: dict[str, Any]) -> None:
    assert isinstance(policy.session_named(body), Refusal)
    named = {"session_id": SESSION, "lease": "7:w:n"}
    assert policy.session_named(named) == (SESSION, "7:w:n")
