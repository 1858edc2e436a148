"""Bootstrap and teardown at a real API server, each with exactly the rights that the chart gives it.

The accounts and roles of both hooks are applied into namespaces of their own; then the hook's code runs with
a token of its account.
"""

from __future__ import annotations

import asyncio
import json
import pathlib
import subprocess
import uuid
from collections.abc import Iterator

import pytest
import yaml

from chart.conftest import ROOT, Json, Render
from cowhand.bootstrap.run import Bootstrap
from cowhand.bootstrap.teardown import teardown
from cowhand.kube.client import connect
from cowhand.kube.errors import Forbidden
from cowhand.settings import BootstrapSettings

pytestmark = pytest.mark.apiserver

CLAIMS = ("data-cowhand-archive-0", "data-cowhand-store-0")


class Api:
    """kubectl, two namespaces, and kubeconfig files of the hooks' accounts."""

    def __init__(self, folder: pathlib.Path) -> None:
        def output(*command: str) -> str:
            return subprocess.run(
                command, check=True, capture_output=True, text=True
            ).stdout.strip()

        self._folder = folder
        self._kubectl = output(str(ROOT / "hack/tools.sh"), "path", "kubectl")
        self._config = output(str(ROOT / "hack/cluster.sh"), "kubeconfig")
        mark = uuid.uuid4().hex[:8]
        self.system, self.tenant = f"hook-system-{mark}", f"hook-tenant-{mark}"

    def kubectl(self, *args: str, stdin: object = None) -> str:
        done = subprocess.run(
            [self._kubectl, "--kubeconfig", self._config, *args],
            input=json.dumps(stdin) if stdin is not None else None,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def apply(self, *objects: Json) -> None:
        body = {"apiVersion": "v1", "kind": "List", "items": list(objects)}
        self.kubectl("apply", "-f", "-", stdin=body)

    def exists(self, namespace: str, *what: str) -> bool:
        return bool(self.kubectl("get", "-n", namespace, *what, "--ignore-not-found", "-o", "name"))

    def account(self, name: str) -> str:
        """Path of a kubeconfig that speaks as this account of the control plane's namespace."""
        config = yaml.safe_load(pathlib.Path(self._config).read_text())
        token = self.kubectl("create", "token", name, "-n", self.system).strip()
        config["users"] = [{"name": u["name"], "user": {"token": token}} for u in config["users"]]
        path = self._folder / f"{name}.kubeconfig"
        path.write_text(yaml.safe_dump(config))
        return str(path)

    def settings(self, *, purge: bool = False) -> BootstrapSettings:
        return BootstrapSettings(namespace=self.system, tenants=(self.tenant,), purge=purge)


@pytest.fixture
def api(tmp_path: pathlib.Path) -> Iterator[Api]:
    made = Api(tmp_path)
    for namespace in (made.system, made.tenant):
        made.kubectl("create", "namespace", namespace)
    yield made
    made.kubectl("delete", "namespace", made.system, made.tenant, "--wait=false")


def install_rights(api: Api, render: Render, hook: str, *, purge: bool = False) -> None:
    objects = render({"tenants": [api.tenant], "purge": purge}, api.system)
    api.apply(
        *(
            o
            for o in objects
            if o["metadata"]["name"] == f"cowhand-{hook}"
            and o["kind"] in ("ServiceAccount", "Role", "RoleBinding")
        )
    )


async def bootstrap(api: Api) -> None:
    kube = await connect(api.account("cowhand-bootstrap"))
    try:
        await Bootstrap(kube, api.settings()).run()
    finally:
        await kube.close()


async def take_apart(api: Api, *, purge: bool = False) -> None:
    async def no_patience(_: float) -> None:
        await asyncio.sleep(0)

    kube = await connect(api.account("cowhand-teardown"))
    try:
        await teardown(kube, api.settings(purge=purge), sleep=no_patience)
    finally:
        await kube.close()


def data(api: Api) -> dict[str, Json]:
    return {
        f"{item['kind']}/{namespace}/{item['metadata']['name']}": item["data"]
        for namespace in (api.system, api.tenant)
        for item in json.loads(
            api.kubectl("get", "secret,configmap", "-n", namespace, "-o", "json")
        )["items"]
        if item["metadata"]["name"].startswith("cowhand-")
    }


async def test_bootstrap_needs_no_more_than_the_chart_gives(api: Api, render: Render) -> None:
    install_rights(api, render, "bootstrap")
    await bootstrap(api)
    made = data(api)
    assert len(made) == 13
    await asyncio.gather(bootstrap(api), bootstrap(api))
    assert data(api) == made


async def test_bootstrap_fails_without_the_rights(api: Api, render: Render) -> None:
    """The control: the test above runs with the account's rights, not with an administrator's."""
    install_rights(api, render, "bootstrap")
    api.kubectl("delete", "rolebinding", "cowhand-bootstrap", "-n", api.tenant)
    with pytest.raises(Forbidden):
        await bootstrap(api)


def fill(api: Api) -> None:
    """A session with our finalizer, a sandbox pod, a Deployment and a volume claim."""
    sandbox = {"app.kubernetes.io/name": "cowhand", "app.kubernetes.io/component": "sandbox"}
    container = {"name": "c", "image": "cowhand/none:none"}

    def pod(name: str, labels: Json) -> Json:
        return {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name, "namespace": api.tenant, "labels": labels},
            "spec": {"schedulingGates": [{"name": "cowhand.dev/never"}], "containers": [container]},
        }

    template = {"metadata": {"labels": {"a": "b"}}, "spec": {"containers": [container]}}
    api.apply(
        {
            "apiVersion": "cowhand.dev/v1alpha1",
            "kind": "AgentSession",
            "metadata": {
                "name": "s",
                "namespace": api.tenant,
                "finalizers": ["cowhand.dev/session"],
            },
            "spec": {"agentRef": {"name": "a"}, "message": "m"},
        },
        pod("sandbox", sandbox),
        pod("web", {"app": "web"}),
        {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": {"name": "cowhand-operator", "namespace": api.system},
            "spec": {"replicas": 0, "selector": {"matchLabels": {"a": "b"}}, "template": template},
        },
        *(
            {
                "apiVersion": "v1",
                "kind": "PersistentVolumeClaim",
                "metadata": {"name": name, "namespace": api.system},
                "spec": {
                    "accessModes": ["ReadWriteOnce"],
                    "resources": {"requests": {"storage": "1Mi"}},
                },
            }
            for name in CLAIMS
        ),
    )
    status = {"sessionID": "sesn_x", "state": "idle", "mode": "Running"}
    api.kubectl(
        *("patch", "agentsession", "s", "-n", api.tenant, "--subresource=status", "--type=merge"),
        *("-p", json.dumps({"status": status})),
    )


@pytest.mark.parametrize("purge", [False, True])
async def test_teardown_needs_no_more_than_the_chart_gives(
    api: Api, render: Render, purge: bool
) -> None:
    install_rights(api, render, "bootstrap")
    await bootstrap(api)
    install_rights(api, render, "teardown", purge=purge)
    fill(api)
    await take_apart(api, purge=purge)
    assert not api.exists(api.tenant, "pod", "sandbox")
    assert api.exists(api.tenant, "pod", "web")
    if not purge:
        session = json.loads(
            api.kubectl("get", "agentsession", "s", "-n", api.tenant, "-o", "json")
        )
        assert session["spec"]["operatingMode"] == "Suspended"
        assert "finalizers" not in session["metadata"]
        assert all(api.exists(api.system, "pvc", name) for name in CLAIMS)
        assert len(data(api)) == 13
    else:
        assert not api.exists(api.tenant, "agentsession", "s")
        for name in CLAIMS:
            claim = api.kubectl(
                "get", "pvc", name, "-n", api.system, "--ignore-not-found", "-o", "json"
            )
            assert not claim or json.loads(claim)["metadata"].get("deletionTimestamp")
        assert data(api) == {}
