"""`cowhand doctor` judges a snapshot; tables are pure functions of resources and the time."""

from __future__ import annotations

import pytest

from cowhand.cli import table
from cowhand.cli.client import GatewayUnavailable, Refused, refusal
from cowhand.cli.commands import hand_of, manifest_of, session_in, waiting_calls
from cowhand.cli.doctor import CRDS, Snapshot, judge
from cowhand.cli.watch import Turn
from cowhand.errors import Denied, SessionNotFound, Unauthenticated, UserError


def healthy():
    env = [
        {"name": "COWHAND_MODEL_SECRET", "value": "my-key"},
        {"name": "COWHAND_MODEL_BASE_URL", "value": "http://models.svc:8080"},
        {"name": "COWHAND_SANDBOX_IMAGE", "value": "box:1"},
    ]
    ready = {"spec": {"replicas": 1}, "status": {"readyReplicas": 1}}
    operator = {
        "spec": {"replicas": 2, "template": {"spec": {"containers": [{"env": env}]}}},
        "status": {"readyReplicas": 2},
    }
    return Snapshot(
        "team",
        "system",
        server="v1.34.0",
        crds=frozenset(f"{name}.cowhand.dev" for name in CRDS),
        workloads={
            "system/deployment/cowhand-operator": operator,
            "system/deployment/cowhand-broker": ready,
            "system/deployment/cowhand-gateway": ready,
            "team/deployment/cowhand-harness": ready,
        },
        secret={
            "metadata": {"annotations": {"cowhand.dev/allowed-hosts": "a.b, models.svc:8080"}},
            "keys": ["api-key"],
        },
        images=frozenset({"docker.io/library/box:1"}),
        health={
            "status": "ok",
            "version": "0.1.0",
            "store": "ok",
            "broker": "ok",
            "store_profile": {"demanded": "dev", "effective": "dev", "server": "Valkey 8.1.0"},
        },
    )


def verdicts(seen):
    return {line.what: (line.verdict, line.text) for line in judge(seen)}


def test_a_healthy_installation_is_all_ok():
    assert {verdict for verdict, _ in verdicts(healthy()).values()} == {"ok"}


def broken(change):
    seen = healthy()
    change(seen)
    return seen


@pytest.mark.parametrize(
    ("change", "what", "verdict", "says"),
    [
        (lambda s: setattr(s, "server", ""), "API server", "fail", "no answer"),
        (lambda s: setattr(s, "crds", frozenset()), "custom resources", "fail", "kubectl apply"),
        (
            lambda s: s.workloads.update({"system/deployment/cowhand-broker": None}),
            "broker",
            "fail",
            "helm install",
        ),
        (
            lambda s: s.workloads.update({"team/deployment/cowhand-harness": None}),
            "harness",
            "fail",
            "is team one of the chart's `tenants`?",
        ),
        (
            lambda s: s.workloads["system/deployment/cowhand-operator"].update(status={}),
            "operator",
            "fail",
            "0 of 2 ready: `kubectl -n system describe",
        ),
        (
            lambda s: s.workloads["system/deployment/cowhand-operator"].update(
                status={"readyReplicas": 1}
            ),
            "operator",
            "warn",
            "1 of 2 ready",
        ),
        (lambda s: setattr(s, "health", {}), "gateway answers", "fail", "no answer"),
        (
            lambda s: setattr(s, "health", {**s.health, "store": "refused"}),
            "store answers",
            "fail",
            "refused: look at the store's pod",
        ),
        (
            lambda s: s.health.pop("store_profile"),
            "store profile",
            "warn",
            "has not been able to ask the store",
        ),
        (
            lambda s: s.health["store_profile"].update(demanded="strict", faults=["no file"]),
            "store profile",
            "fail",
            "dev (Valkey 8.1.0), less than strict, which is demanded: no file",
        ),
        (
            lambda s: s.health["store_profile"].update(notes=["slow"]),
            "store profile",
            "warn",
            "dev (Valkey 8.1.0); slow",
        ),
        (
            lambda s: s.health.update(archive="the archive does not answer"),
            "archive answers",
            "fail",
            "cowhand-archive-0",
        ),
        (lambda s: setattr(s, "secret", None), "model key", "fail", "create secret generic my-key"),
        (lambda s: s.secret.update(keys=["key"]), "model key", "fail", "no key `api-key`"),
        (
            lambda s: s.secret["metadata"].update(annotations={}),
            "model key",
            "fail",
            "cowhand.dev/allowed-hosts=models.svc:8080",
        ),
        (
            lambda s: s.secret["metadata"].update(
                annotations={"cowhand.dev/allowed-hosts": "other"}
            ),
            "model key",
            "fail",
            "=models.svc:8080,other",
        ),
        (lambda s: s.errors.update(secret="forbidden"), "model key", "warn", "forbidden"),
        (lambda s: setattr(s, "images", frozenset()), "sandbox image", "warn", "on no node yet"),
        (lambda s: s.errors.update(images="forbidden"), "sandbox image", "warn", "forbidden"),
    ],
)
def test_what_is_wrong_is_named_with_its_remedy(change, what, verdict, says):
    found = verdicts(broken(change))[what]
    assert found[0] == verdict
    assert says in found[1]


@pytest.mark.parametrize(
    ("said", "what"), [("ok", "archive answers"), ("none", "archive"), (None, "")]
)
def test_an_archive_is_ok_absent_or_not_known_to_an_older_gateway(said, what):
    seen = healthy()
    if said is not None:
        seen.health["archive"] = said
    lines = [line for line in judge(seen) if line.what.startswith("archive")]
    assert [(line.verdict, line.what) for line in lines] == ([("ok", what)] if what else [])


@pytest.mark.parametrize("hosts", ["models.svc:8080", "x,Models.svc:8080"])
def test_the_hosts_that_the_broker_accepts_are_ok_here_too(hosts):
    seen = healthy()
    seen.secret["metadata"]["annotations"] = {"cowhand.dev/allowed-hosts": hosts}
    assert verdicts(seen)["model key"][0] == "ok"


NOW = 1_800_000_000.0


def session(**status):
    return {
        "metadata": {
            "name": "fix",
            "namespace": "default",
            "creationTimestamp": "2027-01-15T07:55:00Z",
        },
        "status": status,
    }


def test_the_table_of_sessions():
    done = {"type": "TurnComplete", "status": "True", "reason": "EndTurn"}
    rows = [
        session(
            state="idle",
            conditions=[done],
            turns=2,
            toolCalls=5,
            usage={"inputTokens": 10, "outputTokens": 7},
            sessionID="sesn_1",
        ),
        session(),
    ]
    assert table.sessions(rows, NOW).splitlines() == [
        "NAME   STATE     TURN      TURNS   TOOLS   TOKENS   AGE   SESSION",
        "fix    idle      EndTurn   2       5       17       5m    sesn_1",
        "fix    Pending             0       0       0        5m",
    ]
    assert table.sessions(rows, NOW, namespaces=True).startswith("NAMESPACE   NAME")
    assert "cowhand run" in table.sessions([], NOW)


def test_a_session_in_detail():
    text = table.session(
        session(
            state="idle",
            hands=[{"name": "sandbox", "instance": 1, "state": "Ready", "sandboxName": "b"}],
            conditions=[{"type": "Ready", "status": "True", "reason": "Accepted", "message": "m"}],
            error={"type": "overloaded_error", "message": "\x1b[2Jbusy"},
        ),
        NOW,
    )
    assert "sandbox   1          Ready   b" in text
    assert "Ready       True     Accepted   m" in text
    assert "\x1b" not in text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0s"), (119, "119s"), (120, "2m"), (7200, "2h"), (200_000, "2d")]
)
def test_ages(seconds, text):
    assert table.age("2027-01-15T08:00:00Z", NOW + seconds) == text


def test_a_turn_is_at_rest_only_behind_its_last_input():
    def event(seq, kind, **data):
        return {"seq": seq, "type": kind, "payload": {"d": data}}

    turn = Turn()
    turn.feed(event(1, "session.created"))
    assert not turn.at_rest(1)
    turn.feed(event(2, "session.status_idle", stop_reason={"type": "end_turn"}))
    assert turn.at_rest(2)
    assert not turn.at_rest(3)
    turn.feed(event(3, "session.exec"))
    assert turn.at_rest(3)
    turn.feed(event(4, "user.message"))
    assert not turn.at_rest(4)
    turn.feed(event(5, "session.status_idle", stop_reason={"type": "requires_action"}))
    assert (turn.at_rest(5), turn.exit_code()) == (True, 3)
    turn.feed(event(6, "session.status_idle", stop_reason={"type": "retries_exhausted"}))
    assert turn.exit_code() == 1
    turn.feed(event(7, "session.deleted"))
    assert turn.at_rest(99)


def test_one_session_can_be_followed_after_apply():
    item = {"kind": "AgentSession", "metadata": {"name": "a", "namespace": "n"}}
    assert session_in(item, "x") == ("a", "n")
    with pytest.raises(UserError, match="holds 2 AgentSessions"):
        session_in({"kind": "List", "items": [item, item]}, "x")
    with pytest.raises(UserError, match="holds 0 AgentSessions"):
        session_in({"kind": "Agent", "metadata": {"name": "a"}}, "x")


def test_the_live_hand_of_a_session():
    hands = [
        {"name": "a", "state": "Lost", "sandbox": "s1"},
        {"name": "a", "state": "Ready", "sandbox": "s2"},
        {"name": "b", "state": "Ready", "sandbox": "s3"},
    ]
    assert hand_of(hands, "s", "a") == "s2"
    assert hand_of(hands[:2], "s", "") == "s2"
    with pytest.raises(UserError, match="several sandboxes; choose with --hand: a, b"):
        hand_of(hands, "s", "")
    with pytest.raises(UserError, match="no sandbox c now"):
        hand_of(hands, "s", "c")


def test_which_calls_to_answer():
    calls = [{"tool_use_id": "1", "name": "bash"}, {"tool_use_id": "2", "name": "edit"}]
    assert waiting_calls(calls[:1], "confirmation", every=False) == ["1"]
    assert waiting_calls(calls, "confirmation", every=True) == ["1", "2"]
    for pending in ([], calls):
        with pytest.raises(UserError):
            waiting_calls(pending, "confirmation", every=False)
    custom = {"tool_use_id": "3", "name": "lookup", "kind": "custom_tool"}
    assert waiting_calls([*calls, custom], "custom_tool", every=False) == ["3"]
    assert waiting_calls([calls[0], custom], "confirmation", every=False) == ["1"]


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, UserError),
        (401, Unauthenticated),
        (403, Denied),
        (404, SessionNotFound),
        (409, Refused),
        (413, UserError),
        (503, GatewayUnavailable),
    ],
)
def test_answers_of_the_gateway_as_errors(status, kind):
    found = refusal(status, b'{"error":{"message":"why"}}')
    assert type(found) is kind
    assert str(found) == "why"
    assert "HTTP" in str(refusal(status, b"<html>"))


def test_a_manifest_from_flags():
    class Flags:
        message, agent, model, environment, name = "m", "coder", "", "python", "n1"

    assert manifest_of(Flags)["metadata"] == {"name": "n1"}
    assert manifest_of(Flags)["spec"] == {
        "message": "m",
        "agentRef": {"name": "coder"},
        "environmentRef": {"name": "python"},
    }
