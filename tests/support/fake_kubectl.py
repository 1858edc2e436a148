"""A kubectl for tests of the command line: answers from a folder, notes how it was called.

`install` writes an executable `kubectl` into a folder for PATH. State: `objects.json` ("namespace/kind/name" ->
object), `token`, `port` (what port-forward answers; a local server must listen there), `fail.json` (first
word -> what stderr says, exit code 1), `namespace` (of the current context). Calls go to `calls.jsonl`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

SCRIPT = """#!{python}
import json, os, pathlib, sys, time
folder = pathlib.Path({folder!r})
arguments = sys.argv[1:]
with open(folder / "calls.jsonl", "a") as calls:
    calls.write(json.dumps(arguments) + "\\n")
flags = [a for a in arguments if a.startswith("--")]
words = [a for a in arguments if not a.startswith("--")]
namespace = next((a.split("=", 1)[1] for a in flags if a.startswith("--namespace=")), "default")
def read(name, default):
    path = folder / name
    return json.loads(path.read_text()) if path.exists() else default
failures = read("fail.json", {{}})
for key, text in failures.items():
    if key in (words[0], " ".join(words[:2])):
        sys.exit(text)
objects = read("objects.json", {{}})
verb = words[0]
if verb == "config":
    print((folder / "namespace").read_text() if (folder / "namespace").exists() else "")
elif words[:2] == ["create", "token"]:
    print((folder / "token").read_text())
elif verb == "port-forward":
    with open(folder / "forwards", "a") as pids:
        pids.write(str(os.getpid()) + "\\n")
    print("Forwarding from 127.0.0.1:" + (folder / "port").read_text() + " -> 8443", flush=True)
    time.sleep(3600)
elif verb in ("apply", "create"):
    named = words[words.index("-f") + 1]
    source = sys.stdin.read() if named == "-" else pathlib.Path(named).read_text()
    found = json.loads(source)
    (folder / "applied.json").write_text(source)
    items = found["items"] if found["kind"] == "List" else [found]
    for item in items:
        item["metadata"].setdefault("name", item["metadata"].get("generateName", "") + "x1")
        item["metadata"].setdefault("namespace", namespace)
    print(json.dumps(found))
elif verb == "api-resources":
    print("\\n".join(read("crds.json", [])))
elif verb == "get" and "--raw" in flags:
    print('{{"gitVersion": "v1.34.0"}}')
elif verb == "logs":
    print((folder / "logs").read_text(), end="")
elif verb == "get":
    kind = words[1].split(".")[0]
    kind = kind[:-1] if kind.endswith("s") else kind
    if len(words) > 2 and words[2] not in ("-o", "-l"):
        found = objects.get(f"{{namespace}}/{{kind}}/{{words[2]}}")
        if found is not None:
            print(json.dumps(found))
    else:
        everywhere = "--all-namespaces" in flags or kind == "node"
        items = [
            v for k, v in objects.items()
            if k.split("/")[1] == kind and (everywhere or k.startswith(namespace + "/"))
        ]
        print(json.dumps({{"kind": "List", "items": items}}))
else:
    sys.exit("error: unknown command " + verb)
"""


class FakeKubectl:
    """The folder behind the script."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bin = folder / "bin"
        self.bin.mkdir()
        script = self.bin / "kubectl"
        script.write_text(SCRIPT.format(python=sys.executable, folder=str(folder)))
        script.chmod(0o755)
        self.objects: dict[str, Any] = {}

    def put(self, kind: str, name: str, value: dict[str, Any], namespace: str = "default") -> None:
        """Set an object."""
        value.setdefault("metadata", {}).update(name=name, namespace=namespace)
        value.setdefault("kind", kind)
        self.objects[f"{namespace}/{kind}/{name}"] = value
        self.write("objects.json", self.objects)

    def write(self, name: str, value: Any) -> None:
        """Write a state file: text as it is, anything else as JSON."""
        text = value if isinstance(value, str) else json.dumps(value)
        (self.folder / name).write_text(text)

    def calls(self) -> list[list[str]]:
        """Command lines so far."""
        path = self.folder / "calls.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
