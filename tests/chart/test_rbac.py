"""Every right that the chart gives, with its reason: a right without one is red, and so is a stale reason."""

from __future__ import annotations

import pytest

from chart.conftest import NS, Json, Render

TWO = {"tenants": ["team-a", "team-b"]}
PURGE = {**TWO, "purge": True}

# role @ where -> "group/resource[names]" -> verb -> why. `where`: system, tenant or cluster.
WHY: dict[str, dict[str, dict[str, str]]] = {
    "cowhand-operator @ system": {
        "coordination.k8s.io/leases": {"create": "leader election: makes its Lease"},
        "coordination.k8s.io/leases[cowhand-operator]": {
            "get": "leader election: reads it",
            "patch": "leader election: renews it, takes it over",
        },
        "/configmaps": {
            "create": "the store's identity, once (a create cannot be limited to a name)"
        },
        "/configmaps[cowhand-store-identity]": {"get": "the store's identity"},
        "/events": {"create": "the store keeps less than demanded, or keeps it again"},
        "apps/deployments[cowhand-operator]": {"get": "whose Events these are: their uid"},
    },
    "cowhand-operator @ tenant": {
        "/configmaps": {"get": "spec.resources: says which ConfigMap or key is missing"},
        "/pods": {
            "create": "sandbox pods",
            "delete": "sandbox pods: suspended, expired, lost",
            "get": "sandbox pods: conditions",
            "list": "sandbox and harness pods: resync, missed deletions",
            "watch": "sandbox and harness pods: a dead harness is known at once",
        },
        "apps/deployments[cowhand-harness]": {"get": "harness: how many pods there are"},
        "apps/deployments/scale[cowhand-harness]": {"patch": "harness: scaling"},
        "autoscaling/horizontalpodautoscalers": {
            "list": "harness: leave replicas alone if one owns them",
        },
        "keda.sh/scaledobjects": {"list": "harness: leave replicas alone if one owns them"},
        "cowhand.dev/agents": {
            "get": "resolves agentRef",
            "list": "resolves agentRef",
            "watch": "a session that waits for its agent goes on",
        },
        "cowhand.dev/environments": {
            "get": "resolves environmentRef",
            "list": "resolves environmentRef",
            "watch": "a sandbox that waits for its environment goes on",
        },
        "cowhand.dev/agentsessions": {
            "delete": "ttlSecondsAfterFinished",
            "get": "reconciles",
            "list": "reconciles",
            "patch": "its finalizer",
            "watch": "reconciles",
        },
        "cowhand.dev/agentsessions/status": {"patch": "what was observed"},
        "cowhand.dev/sandboxes/status": {"patch": "what was observed"},
        "cowhand.dev/sandboxes": {
            "create": "a session's hand",
            "delete": "a session's hand: lost, or its session is gone; ttlSecondsAfterCreation",
            "get": "reconciles",
            "list": "reconciles",
            "patch": "a session's hand: suspends and resumes it",
            "watch": "reconciles",
        },
    },
    "cowhand-broker @ system": {
        "/secrets": {"create": "its signing keys, once (a create cannot be limited to a name)"},
        "/secrets[cowhand-broker-keys]": {
            "get": "its signing keys",
            "patch": "rotates them",
        },
    },
    "cowhand-broker @ tenant": {
        "/pods": {"get": "whose pod a token belongs to: labels, address, owner"},
        "/secrets[cowhand-model]": {"get": "the model key"},
        "cowhand.dev/sandboxes": {"get": "register: who may execute in it"},
    },
    "cowhand-broker @ cluster": {
        "authentication.k8s.io/tokenreviews": {"create": "who is calling"},
    },
    "cowhand-gateway @ tenant": {
        "cowhand.dev/agentsessions": {"get": "from a name to a session id"},
        "cowhand.dev/sandboxes": {"get": "exec: from a name to a sandbox"},
    },
    "cowhand-gateway @ cluster": {
        "authentication.k8s.io/tokenreviews": {"create": "who is calling"},
        "authorization.k8s.io/subjectaccessreviews": {"create": "whether they may"},
    },
    "cowhand-archive @ cluster": {
        "authentication.k8s.io/tokenreviews": {"create": "who is calling"},
    },
    "cowhand-cli @ tenant": {
        "cowhand.dev/agentsessions/approvals": {"create": "cowhand approve, deny"},
        "cowhand.dev/agentsessions/exec": {"create": "cowhand exec"},
        "cowhand.dev/agentsessions/messages": {"create": "cowhand send, interrupt"},
        "cowhand.dev/agentsessions/events": {"get": "cowhand events, logs"},
    },
    "cowhand-view @ cluster": {
        **{
            f"cowhand.dev/{kind}": {
                "get": "people who may view",
                "list": "people who may view",
                "watch": "people who may view",
            }
            for kind in ("agents", "agentsessions", "environments", "sandboxes")
        },
        "cowhand.dev/agentsessions/events": {"get": "people who may view, as with pods/log"},
    },
    "cowhand-edit @ cluster": {
        "/serviceaccounts/token[cowhand-cli]": {"create": "the CLI asks for its token"},
        **{
            f"cowhand.dev/{kind}": dict.fromkeys(
                ("create", "delete", "deletecollection", "patch", "update"), "people who may edit"
            )
            for kind in ("agents", "agentsessions", "environments", "sandboxes")
        },
        **{
            f"cowhand.dev/agentsessions/{part}": {"create": "people who may edit"}
            for part in ("approvals", "exec", "messages")
        },
    },
    "cowhand-admin @ cluster": {
        "cowhand.dev/agentsessions/systemmessages": {"create": "admins: cowhand send --system"},
    },
    "cowhand-restore @ cluster": {
        "cowhand.dev/agentsessions/restore": {"create": "cowhand restore; bound to nobody"},
    },
    "cowhand-connect @ system": {
        "/configmaps[cowhand-ca]": {"get": "the CLI checks the gateway's certificate"},
        "/pods": {"get": "port-forward to the gateway", "list": "port-forward to the gateway"},
        "/pods/portforward": {
            "create": "port-forward to the gateway",
            "get": "port-forward to the gateway over a websocket",
        },
        "/services[cowhand-gateway]": {"get": "finds the gateway's pods"},
    },
    "cowhand-bootstrap @ system": {
        "/configmaps": {"create": "cowhand-ca"},
        "/secrets": {"create": "CA, certificates, store logins"},
        "/configmaps[cowhand-ca]": {"get": "is it there", "patch": "follows a new CA"},
        "/secrets[cowhand-ca-key cowhand-store-acl cowhand-store-archive cowhand-store-broker "
        "cowhand-store-gateway cowhand-store-operator cowhand-tls-archive cowhand-tls-broker "
        "cowhand-tls-gateway cowhand-tls-store]": {
            "get": "is it there",
            "patch": "renews certificates, adds store users",
        },
    },
    "cowhand-bootstrap @ tenant": {
        "/configmaps": {"create": "cowhand-ca"},
        "/secrets": {"create": "the tenant's store login"},
        "/configmaps[cowhand-ca]": {"get": "is it there", "patch": "follows a new CA"},
        "/secrets[cowhand-store]": {"get": "its hash in users.acl", "patch": "completes it"},
    },
    "cowhand-teardown @ system": {
        "/pods": {"list": "waits for the operator to be gone"},
        "apps/deployments/scale[cowhand-operator]": {"patch": "stops the operator"},
    },
    "cowhand-teardown @ tenant": {
        "/pods": {"delete": "sandbox pods", "list": "sandbox pods"},
        "cowhand.dev/agentsessions": {
            "list": "suspends them, removes our finalizer",
            "patch": "suspends them, removes our finalizer",
        },
    },
}

WHY_PURGE: dict[str, dict[str, dict[str, str]]] = {
    "cowhand-teardown @ system": {
        "/configmaps[cowhand-ca cowhand-store-identity]": {"delete": "purge"},
        "/persistentvolumeclaims[data-cowhand-archive-0 data-cowhand-store-0]": {"delete": "purge"},
        "/secrets[cowhand-broker-keys cowhand-ca-key cowhand-store-acl cowhand-store-archive "
        "cowhand-store-broker cowhand-store-gateway cowhand-store-operator cowhand-tls-archive "
        "cowhand-tls-broker cowhand-tls-gateway cowhand-tls-store]": {"delete": "purge"},
    },
    "cowhand-teardown @ tenant": {
        "/configmaps[cowhand-ca]": {"delete": "purge"},
        "/secrets[cowhand-store]": {"delete": "purge"},
        **{
            f"cowhand.dev/{kind}": {"delete": "purge", "list": "purge"}
            for kind in ("agents", "agentsessions", "environments", "sandboxes")
        },
    },
}

Rights = set[tuple[str, str, str]]


def rights(objects: list[Json]) -> Rights:
    """(role @ where, group/resource[names], verb) of every rule."""
    found: Rights = set()
    for item in objects:
        if item["kind"] not in ("Role", "ClusterRole"):
            continue
        namespace = item["metadata"].get("namespace")
        where = {None: "cluster", NS: "system"}.get(namespace, "tenant")
        for rule in item["rules"]:
            names = f"[{' '.join(rule['resourceNames'])}]" if rule.get("resourceNames") else ""
            found |= {
                (f"{item['metadata']['name']} @ {where}", f"{group}/{resource}{names}", verb)
                for group in rule["apiGroups"]
                for resource in rule["resources"]
                for verb in rule["verbs"]
            }
    return found


def reasons(table: dict[str, dict[str, dict[str, str]]]) -> Rights:
    return {
        (role, resource, verb)
        for role, resources in table.items()
        for resource, verbs in resources.items()
        for verb, why in verbs.items()
        if why
    }


def test_every_right_has_a_reason_and_every_reason_a_right(render: Render) -> None:
    given = rights(render(TWO))
    assert given - reasons(WHY) == set()
    assert reasons(WHY) - given == set()


def test_a_purge_gives_the_teardown_what_it_deletes_and_nobody_else_anything(
    render: Render,
) -> None:
    given = rights(render(PURGE))
    assert given == reasons(WHY) | reasons(WHY_PURGE)


def test_all_tenants_are_alike(render: Render) -> None:
    def of(tenant: str) -> dict[str, list[Json]]:
        return {
            o["metadata"]["name"]: o["rules"]
            for o in render(TWO)
            if o["kind"] == "Role" and o["metadata"]["namespace"] == tenant
        }

    assert of("team-a") == of("team-b") != {}


def test_more_secrets_of_agents_can_be_named(render: Render) -> None:
    given = rights(render({"model": {"extraSecretNames": ["b-key", "a-key"]}}))
    assert ("cowhand-broker @ tenant", "/secrets[a-key b-key cowhand-model]", "get") in given


@pytest.mark.parametrize("values", [TWO, PURGE])
def test_nothing_is_wild_and_everything_is_sorted(render: Render, values: Json) -> None:
    for item in render(values):
        for rule in item.get("rules", []) if item["kind"].endswith("Role") else []:
            everything = [*rule["apiGroups"], *rule["resources"], *rule["verbs"]]
            assert "*" not in everything
            assert rule["resources"] == sorted(rule["resources"])
            assert rule["verbs"] == sorted(rule["verbs"])
            assert not {"escalate", "bind", "impersonate"} & set(rule["verbs"])


def test_the_operator_reads_no_secret(render: Render) -> None:
    assert not [r for r in rights(render(TWO)) if "operator" in r[0] and "secrets" in r[1]]
    bound = [o for o in render(TWO) if o["kind"] == "ClusterRoleBinding"]
    assert {s["name"] for o in bound for s in o["subjects"]} == {
        "cowhand-archive",
        "cowhand-broker",
        "cowhand-gateway",
    }


def test_harness_and_sandbox_accounts_have_no_rights_at_all(render: Render) -> None:
    bindings = [o for o in render(TWO) if o["kind"] in ("RoleBinding", "ClusterRoleBinding")]
    subjects = {s["name"] for o in bindings for s in o["subjects"]}
    assert not subjects & {"cowhand-harness", "cowhand-sandbox", "cowhand-store"}


def test_roles_and_bindings_belong_together(render: Render) -> None:
    objects = render(TWO)
    accounts = {
        (o["metadata"]["namespace"], o["metadata"]["name"])
        for o in objects
        if o["kind"] == "ServiceAccount"
    }
    roles = {
        (o["kind"], o["metadata"].get("namespace"), o["metadata"]["name"])
        for o in objects
        if o["kind"].endswith("Role")
    }
    used = set()
    for item in objects:
        if item["kind"].endswith("RoleBinding"):
            ref = item["roleRef"]
            key = (ref["kind"], item["metadata"].get("namespace"), ref["name"])
            assert key in roles
            used.add(key)
            assert {(s["namespace"], s["name"]) for s in item["subjects"]} <= accounts
    unbound = {key[2] for key in roles - used}
    people = ("view", "edit", "admin", "restore", "connect")
    assert unbound == {f"cowhand-{name}" for name in people}
