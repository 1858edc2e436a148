"""The chart renders, the same at every time, with values that are all documented."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from typing import Any

import jsonschema
import pytest
import yaml

from chart.conftest import CHART, NS, ROOT, Json, Refused, Render, containers, pick, pods
from cowhand import settings
from cowhand.api.v1alpha1 import EnvironmentSpec

SCHEMA = json.loads((CHART / "values.schema.json").read_text())
VALUES = yaml.safe_load((CHART / "values.yaml").read_text())
TWO = {"tenants": ["team-b", "team-a"]}
EXTERNAL = {"store": {"embedded": False, "external": {"url": "rediss://db.example:6380/0"}}}
ALL_VALUES: tuple[Json, ...] = (
    {},
    TWO,
    EXTERNAL,
    {"purge": True, "crds": {"keep": False}},
    {"networkPolicy": {"enabled": False}, "admissionPolicies": {"enabled": False}},
    {"archive": {"enabled": False}},
    {"archive": {"url": "s3://bucket/prefix", "credentialsSecret": "bucket-key"}},
    {"imagePullSecrets": [{"name": "login"}], "nodeSelector": {"a": "b"}},
)

# Values whose content is the user's: a leaf for the documentation.
OPAQUE = {
    "resources",
    "proxyResources",
    "defaultEnvironment",
    "nodeSelector",
    "labels",
    "options",
    "tenantWeights",
}


def leaves(node: Json, path: str = "") -> list[str]:
    found: list[str] = []
    for key, value in node.items():
        below = f"{path}.{key}" if path else key
        if isinstance(value, dict) and key not in OPAQUE:
            found += leaves(value, below)
        else:
            found.append(below)
    return found


def test_there_are_not_too_many_values_and_each_has_a_comment_above_it() -> None:
    assert len(leaves(VALUES)) <= 60
    lines = (CHART / "values.yaml").read_text().splitlines()
    undocumented = [
        line
        for before, line in zip(["", *lines], lines, strict=False)
        if re.match(r"^ *[A-Za-z]+:", line)
        and not before.lstrip().startswith("#")
        and line.strip().split(":")[0] not in ("requests", "limits")
        and not line.startswith("  resources: {memory")
    ]
    assert undocumented == []


def test_values_are_valid_and_the_schema_is_closed() -> None:
    jsonschema.Draft7Validator.check_schema(SCHEMA)
    jsonschema.validate(VALUES, SCHEMA)

    def open_objects(node: Any, path: str) -> list[str]:
        found = []
        if isinstance(node, dict):
            if "properties" in node and node.get("additionalProperties") is not False:
                found.append(path)
            for key, child in node.items():
                found += open_objects(child, f"{path}/{key}")
        return found

    assert open_objects(SCHEMA, "#") == []


def test_schema_and_values_know_the_same_names() -> None:
    def resolve(node: Json) -> Json:
        ref = node.get("$ref")
        return SCHEMA["definitions"][ref.rpartition("/")[2]] if ref else node

    def names(node: Json, path: str = "") -> set[str]:
        node = resolve(node)
        found: set[str] = set()
        for key, child in node.get("properties", {}).items():
            below = f"{path}.{key}" if path else key
            deeper = names(child, below) if key not in OPAQUE else set()
            found |= deeper or {below}
        return found

    assert names(SCHEMA) - {"global"} == set(leaves(VALUES))


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"tenant": ["a"]}, "tenant"),
        ({"modelServer": {"image": {"tag": "1"}}}, "modelServer"),
        ({"tenants": []}, "tenants"),
        ({"tenants": ["Not-A-Name"]}, "tenants"),
        ({"tenants": ["a", "a"]}, "tenants"),
        ({"tenants": [NS]}, "cannot be a tenant"),
        ({"model": {"baseURL": "ftp://x"}}, "baseURL"),
        ({"operator": {"replicas": 0}}, "replicas"),
        ({"store": {"embedded": False}}, "store.external.url must be set"),
        ({"store": {"profile": "standard"}}, "only the profiles dev and strict"),
        ({"store": {"profile": "managed"}}, "only the profiles dev and strict"),
        ({"store": {"profile": "none"}}, "profile"),
        (
            {"store": {**EXTERNAL["store"], "profile": "standard", "replicas": 0}},
            "at least one replica",
        ),
        ({"archive": {"url": "file:///elsewhere"}}, "url"),
        ({"archive": {"url": "s3://bucket/../x y"}}, "url"),
        ({"archive": {"url": "http://bucket"}}, "url"),
        ({"archive": {"options": {"aws_region": 1}}}, "options"),
        ({"archive": {"replicas": 2}}, "replicas"),
        ({"harness": {"min": 5, "max": 2}}, "harness.min"),
        ({"image": "cowhand:1"}, "image"),
        ({"limits": {"maxConcurrentRequests": -1}}, "maxConcurrentRequests"),
        ({"limits": {"tenantWeights": {"team-a": 0}}}, "tenantWeights"),
        ({"limits": {"tenantWeights": {"Team A": 1}}}, "'Team A' does not match"),
    ],
)
def test_wrong_values_are_refused_by_name(render: Render, values: Json, text: str) -> None:
    with pytest.raises(Refused, match=re.escape(text)):
        render(values)


@pytest.mark.parametrize("values", [{}, EXTERNAL], ids=["defaults", "external"])
def test_helm_lint_has_nothing_to_say(
    helm_lint: Callable[[Json], subprocess.CompletedProcess[str]], values: Json
) -> None:
    done = helm_lint(values)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[WARNING]" not in done.stdout


@pytest.mark.parametrize("values", ALL_VALUES, ids=range(len(ALL_VALUES)))
def test_two_renderings_are_equal(helm_text: Callable[..., str], values: Json) -> None:
    assert helm_text(values) == helm_text(values)


def test_no_template_asks_the_cluster_or_makes_something_random() -> None:
    for path in (CHART / "templates").rglob("*"):
        if path.is_file():
            text = path.read_text()
            assert not re.search(
                r"\b(lookup|rand(Alpha|AlphaNum|Ascii|Numeric|Bytes|Int)|genCA|genSelfSigned\w+|genSigned\w+|genPrivateKey|uuidv4|now|derivePassword)\b",
                "\n".join(re.findall(r"{{.*?}}", text, re.S)),
            ), path


def test_values_as_the_image_build_writes_them_are_accepted(render: Render) -> None:
    image = {"repository": "cowhand/x", "tag": "0123"}
    values = {"image": image, "sandboxImage": image, "store": {"image": image}}
    for _, _, spec in pods(render(values)):
        assert {c["image"] for c in containers(spec)} == {"cowhand/x:0123"}


@pytest.mark.parametrize("values", ALL_VALUES, ids=range(len(ALL_VALUES)))
def test_every_object_is_complete(render: Render, values: Json) -> None:
    seen = set()
    for item in render(values):
        meta = item["metadata"]
        key = (item["kind"], meta.get("namespace"), meta["name"])
        assert key not in seen
        seen.add(key)
        cluster_wide = item["kind"].startswith(("Cluster", "Custom", "ValidatingAdmission"))
        assert cluster_wide != bool(meta.get("namespace")), key
        assert meta["labels"]["app.kubernetes.io/name"] == "cowhand"
        assert item["kind"] != "Secret", "bootstrap makes Secrets, templates do not"


@pytest.mark.parametrize("values", ALL_VALUES, ids=range(len(ALL_VALUES)))
def test_what_is_referred_to_exists(render: Render, values: Json) -> None:
    """Accounts, selectors, Services, mounts and ConfigMaps: what a server would only find at run time."""
    objects = render(values)
    accounts = {
        (o["metadata"]["namespace"], o["metadata"]["name"])
        for o in objects
        if o["kind"] == "ServiceAccount"
    }
    known = {"cowhand-ca"} | {o["metadata"]["name"] for o in objects if o["kind"] == "ConfigMap"}
    secrets = {"cowhand-store", "cowhand-store-acl", "cowhand-tls-store"}
    secrets |= {
        f"cowhand-{a}-{b}"
        for a in ("tls", "store")
        for b in ("operator", "broker", "gateway", "archive")
    } | {"bucket-key"}
    for name, item, spec in pods(objects):
        if "serviceAccountName" in spec:
            assert (item["metadata"]["namespace"], spec["serviceAccountName"]) in accounts, name
        volumes = {v["name"]: v for v in spec.get("volumes", [])}
        claims = [c["metadata"]["name"] for c in item["spec"].get("volumeClaimTemplates", [])]
        mounted = {m["name"] for c in containers(spec) for m in c.get("volumeMounts", [])}
        assert mounted == set(volumes) | set(claims), name
        for volume in volumes.values():
            if "configMap" in volume:
                assert volume["configMap"]["name"] in known, name
            if "secret" in volume:
                assert volume["secret"]["secretName"] in secrets, name
        if item["kind"] in ("Deployment", "StatefulSet"):
            selector = item["spec"]["selector"]["matchLabels"]
            assert selector.items() <= item["spec"]["template"]["metadata"]["labels"].items()
    pod_labels = [
        (o["metadata"]["namespace"], o["spec"]["template"]["metadata"]["labels"])
        for _, o, _ in pods(objects)
        if "template" in o["spec"]
    ]
    for item in objects:
        if item["kind"] == "Service":
            selected = [
                labels
                for namespace, labels in pod_labels
                if namespace == item["metadata"]["namespace"]
                and item["spec"]["selector"].items() <= labels.items()
            ]
            assert len(selected) == 1, item["metadata"]["name"]


def env_of(container: Json) -> dict[str, Any]:
    return {e["name"]: e.get("value", e.get("valueFrom")) for e in container.get("env", [])}


def test_each_process_can_read_its_settings_from_its_environment(render: Render) -> None:
    """The env of each container, given to settings.py, as the process would."""
    from cowhand import settings

    objects = render({**TWO, "retentionSeconds": 2592000})

    def load(kind: str, name: str, container: str, namespace: str, loader: Any) -> Any:
        _, _, spec = next(
            p for p in pods([pick(objects, kind, name, namespace)])
        )  # one object, one pod
        found = next(c for c in containers(spec) if c["name"] == container)
        env = {k: v if isinstance(v, str) else "from-the-pod" for k, v in env_of(found).items()}
        env.pop("COWHAND_STORE_PASSWORD_FILE", None)
        unread = set(env)

        class Watched(dict[str, str]):
            def get(self, key: str, default: Any = None) -> Any:
                unread.discard(key)
                return super().get(key, default)

        loaded = loader(Watched(env))
        assert unread == set(), f"{name}: nobody reads {unread}"
        return loaded

    operator = load("Deployment", "cowhand-operator", "operator", NS, settings.operator)
    assert operator.tenants == ("team-a", "team-b")
    assert operator.retain_s == 2592000
    assert operator.broker_url == f"https://cowhand-broker.{NS}.svc:8443"
    assert operator.store.url == f"rediss://cowhand-store.{NS}.svc:6379/0"
    EnvironmentSpec.model_validate(operator.default_environment)
    broker = load("Deployment", "cowhand-broker", "broker", NS, settings.broker)
    assert broker.store.username == "broker"
    gateway = load("Deployment", "cowhand-gateway", "gateway", NS, settings.gateway)
    assert gateway.store.username == "gateway"
    harness = load("Deployment", "cowhand-harness", "harness", "team-b", settings.harness)
    assert (harness.namespace, harness.store.username) == ("team-b", "t-team-b")
    proxy = load("Deployment", "cowhand-harness", "proxy", "team-b", settings.proxy)
    assert (proxy.mode, proxy.listen_host) == ("harness", "127.0.0.1")
    archive = load("StatefulSet", "cowhand-archive", "archive", NS, settings.archive)
    assert archive.store.username == "archive"
    for name, mode in (("bootstrap", "install"), ("teardown", "teardown")):
        made = load("Job", f"cowhand-{name}", name, NS, settings.bootstrap)
        assert (made.mode, made.tenants, made.purge) == (mode, ("team-a", "team-b"), False)


def test_files_that_settings_name_are_mounted(render: Render) -> None:
    from cowhand import settings

    proxy = settings.proxy({"COWHAND_PROXY_MODE": "harness", "COWHAND_BROKER_URL": "x"})
    spec = pick(render(), "Deployment", "cowhand-harness")["spec"]["template"]["spec"]
    mounts = [m["mountPath"] for m in spec["initContainers"][0]["volumeMounts"]]
    for path in (proxy.ca_file, proxy.token_file, proxy.ready_file):
        assert any(path.startswith(f"{mount}/") for mount in mounts), path
    for name, needs in (
        ("broker", ["/etc/cowhand/tls/tls.crt"]),
        ("gateway", ["/etc/cowhand/tls/tls.crt", "/etc/cowhand/ca/ca.crt", proxy.token_file]),
    ):
        spec = pick(render(), "Deployment", f"cowhand-{name}")["spec"]["template"]["spec"]
        mounts = [m["mountPath"] for m in spec["containers"][0]["volumeMounts"]]
        for path in needs:
            assert any(path.startswith(f"{mount}/") for mount in mounts), (name, path)


def test_crds_are_those_of_the_tree_and_are_kept(render: Render) -> None:
    rendered = {
        o["metadata"]["name"]: o for o in render() if o["kind"] == "CustomResourceDefinition"
    }
    for path in (ROOT / "crds").glob("*.yaml"):
        source = yaml.safe_load(path.read_text())
        found = rendered.pop(source["metadata"]["name"])
        assert found["spec"] == source["spec"]
        assert found["metadata"]["annotations"] == {"helm.sh/resource-policy": "keep"}
    assert rendered == {}
    kinds = [o["kind"] for o in render({"crds": {"enabled": False}})]
    assert "CustomResourceDefinition" not in kinds
    free = render({"crds": {"keep": False}})
    assert not [
        o
        for o in free
        if o["kind"] == "CustomResourceDefinition" and "annotations" in o["metadata"]
    ]


def test_the_harness_is_scaled_by_the_operator_alone(render: Render) -> None:
    for tenant in ("team-a", "team-b"):
        deployment = pick(render(TWO), "Deployment", "cowhand-harness", tenant)
        assert "replicas" not in deployment["spec"]


def test_a_new_tenant_restarts_the_store_and_the_order_of_tenants_does_not(render: Render) -> None:
    def mark(*tenants: str) -> str:
        store = pick(render({"tenants": list(tenants)}), "StatefulSet", "cowhand-store")
        found: str = store["spec"]["template"]["metadata"]["annotations"]["checksum/tenants"]
        return found

    assert mark("a", "b") == mark("b", "a")
    assert mark("a") != mark("a", "b")


def test_a_changed_configuration_restarts_the_store(render: Render) -> None:
    def mark(memory: str) -> str:
        store = pick(render({"store": {"maxMemory": memory}}), "StatefulSet", "cowhand-store")
        found: str = store["spec"]["template"]["metadata"]["annotations"]["checksum/files"]
        return found

    assert mark("512mb") == mark("512mb")
    assert mark("512mb") != mark("1gb")


def test_the_broker_knows_how_tenants_share_a_workspace(render: Render) -> None:
    def told(limits: Json) -> dict[str, str]:
        broker = pick(render({"limits": limits}), "Deployment", "cowhand-broker")
        env = env_of(broker["spec"]["template"]["spec"]["containers"][0])
        return {
            name: value for name, value in env.items() if name.endswith(("REQUESTS", "WEIGHTS"))
        }

    assert told({}) == {"COWHAND_MAX_CONCURRENT_REQUESTS": "0"}
    found = told(
        {"maxConcurrentRequests": 64, "tenantWeights": {"b": 0.5, "team-a": 2, "c": 12.25}}
    )
    assert found == {
        "COWHAND_MAX_CONCURRENT_REQUESTS": "64",
        "COWHAND_TENANT_WEIGHTS": "b=0.5,c=12.25,team-a=2",
    }
    assert settings.weights(found["COWHAND_TENANT_WEIGHTS"]) == {"b": 0.5, "c": 12.25, "team-a": 2}


def test_an_external_store_leaves_nothing_of_the_embedded_one(render: Render) -> None:
    objects = render(EXTERNAL)
    sets = [o["metadata"]["name"] for o in objects if o["kind"] == "StatefulSet"]
    assert sets == ["cowhand-archive"]
    assert not [o for o in objects if o["kind"] == "Service" and "store" in o["metadata"]["name"]]
    operator = pick(objects, "Deployment", "cowhand-operator")["spec"]["template"]["spec"]
    assert env_of(operator["containers"][0])["COWHAND_STORE_URL"] == "rediss://db.example:6380/0"
    egress = pick(objects, "NetworkPolicy", "cowhand-harness")["spec"]["egress"]
    assert [{"protocol": "TCP", "port": 6380}] in [rule["ports"] for rule in egress]


def test_hooks_come_before_what_needs_them_and_clean_up(render: Render) -> None:
    hooks = [o for o in render() if "helm.sh/hook" in o["metadata"].get("annotations", {})]
    for item in hooks:
        notes = item["metadata"]["annotations"]
        assert notes["helm.sh/hook-delete-policy"] == "before-hook-creation,hook-succeeded"
        if item["kind"] in ("ServiceAccount", "Role", "RoleBinding"):
            assert int(notes["helm.sh/hook-weight"]) < 0
    by_event: dict[str, set[str]] = {}
    for item in hooks:
        if item["kind"] == "Job":
            by_event.setdefault(item["metadata"]["annotations"]["helm.sh/hook"], set()).add(
                item["metadata"]["name"]
            )
    assert by_event == {
        "pre-install,pre-upgrade": {"cowhand-bootstrap"},
        "pre-delete": {"cowhand-teardown"},
    }


def test_disruption_budgets_never_forbid_a_drain(render: Render) -> None:
    budgets = [o for o in render(TWO) if o["kind"] == "PodDisruptionBudget"]
    assert len(budgets) == 6
    assert {o["spec"]["maxUnavailable"] for o in budgets} == {1}


def test_network_policies_cover_every_pod_of_ours_that_listens(render: Render) -> None:
    objects = render(TWO)
    policies = [o for o in objects if o["kind"] == "NetworkPolicy"]
    for policy in policies:
        assert "Ingress" in policy["spec"]["policyTypes"]
    covered = {
        (
            p["metadata"]["namespace"],
            p["spec"]["podSelector"]["matchLabels"]["app.kubernetes.io/component"],
        )
        for p in policies
    }
    assert covered == {
        *((NS, c) for c in ("operator", "broker", "gateway", "store", "archive")),
        *((t, c) for t in ("team-a", "team-b") for c in ("harness", "sandbox")),
    }
    store = pick(objects, "NetworkPolicy", "cowhand-store")
    assert "egress" not in store["spec"]
    harness = pick(objects, "NetworkPolicy", "cowhand-harness", "team-a")
    ports = [rule["ports"][0]["port"] for rule in harness["spec"]["ingress"]]
    assert ports == [9090]  # the metrics; who may read them is in test_metrics.py


@pytest.mark.parametrize(
    ("url", "port"),
    [
        ("https://api.anthropic.com", 443),
        ("http://model.cowhand-system.svc", 80),
        ("http://model.cowhand-system.svc:8080/v", 8080),
    ],
)
def test_the_port_of_the_model_is_open_to_the_harness(render: Render, url: str, port: int) -> None:
    objects = render({"model": {"baseURL": url}})
    egress = pick(objects, "NetworkPolicy", "cowhand-harness")["spec"]["egress"]
    anywhere = [rule["ports"] for rule in egress if "to" not in rule]
    assert len(anywhere) == 1
    assert {entry["port"] for entry in anywhere[0]} == {443, port}
