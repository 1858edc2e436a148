"""The init containers of a sandbox pod: load the packet filter, and prove that it holds.

`cowhand egress-rules` runs as root with NET_ADMIN and is gone before anybody's code starts;
`cowhand egress-verify` runs under the sandbox's UID. If either fails the pod never runs user code;
one JSON line in the termination message says why, for the operator's `EgressEnforced` condition:
`{"reason": CamelCase, "message": str, "feature"?: str, "failed"?: [str]}`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any, Final

from cowhand.proxy import rules, verify

TERMINATION_LOG: Final = "/dev/termination-log"
_NFT_TIMEOUT_S: Final = 20

Nft = Callable[[list[str], str], "subprocess.CompletedProcess[str]"]


def _nft(arguments: list[str], stdin: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(  # noqa: S603
        ["nft", *arguments],  # noqa: S607
        input=stdin,
        text=True,
        capture_output=True,
        timeout=_NFT_TIMEOUT_S,
        check=False,
    )


def run_rules(*, nft: Nft = _nft, termination_log: str = TERMINATION_LOG) -> int:
    """Load the rules, list them back and compare; the exit code of the init container.

    Returns:
        0, or 1 after one JSON line with `reason` NftMissing, FeatureMissing, RulesRefused or
        RulesIncomplete.
    """
    try:
        loaded = nft(["-f", "-"], rules.render())
        if loaded.returncode != 0:
            return _fail(termination_log, **_why(nft, loaded.stderr))
        listed = nft(["-j", "list", "table", "inet", rules.TABLE], "")
        wrong = rules.differences(json.loads(listed.stdout or "{}"), rules.chains())
    except FileNotFoundError:
        return _fail(
            termination_log,
            reason="NftMissing",
            message="The image has no nft command; use Cowhand's own image for egress-rules.",
        )
    except (subprocess.TimeoutExpired, ValueError) as err:
        return _fail(termination_log, reason="RulesIncomplete", message=f"nft failed: {err}")
    if wrong:
        return _fail(
            termination_log,
            reason="RulesIncomplete",
            message="The kernel does not hold the rules that were loaded: " + "; ".join(wrong),
        )
    return 0


def _why(nft: Nft, stderr: str) -> dict[str, Any]:
    for feature, body in rules.FEATURES:
        if nft(["--check", "-f", "-"], rules.feature_probe(body)).returncode != 0:
            message = (
                f"The node lacks {feature}, or the container lacks NET_ADMIN:"
                f" {_first_line(stderr)}. Use another node or runtimeClass for sandboxes."
            )
            return {"reason": "FeatureMissing", "feature": feature, "message": message}
    return {"reason": "RulesRefused", "message": f"nft refused the rules: {_first_line(stderr)}"}


def _first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "no reason given")


def run_verify(
    env: Mapping[str, str] | None = None, *, termination_log: str = TERMINATION_LOG
) -> int:
    """Try to get out, as this UID; the exit code of the init container.

    Returns:
        0 if every probe was refused at once and loopback works, else 1 after one JSON line with
        reason NotEnforced and the probes in `failed`.
    """
    # KUBERNETES_SERVICE_HOST is set by the kubelet, it is not one of our settings.
    env = os.environ if env is None else env  # noqa: TID251
    outcomes = verify.run_probes(
        env,
        resolv_conf=_text("/etc/resolv.conf"),
        route_table=_text("/proc/net/route"),
        has_v6=_text("/proc/net/if_inet6") != "",
    )
    for outcome in outcomes:
        line = {"probe": outcome.target, "ok": outcome.ok, "detail": outcome.detail}
        sys.stderr.write(json.dumps(line) + "\n")
    failed = [f"{outcome.target}: {outcome.detail}" for outcome in verify.failures(outcomes)]
    if not failed:
        return 0
    return _fail(
        termination_log,
        reason="NotEnforced",
        message="The sandbox is not closed: " + "; ".join(failed),
        failed=failed,
    )


def _text(path: str) -> str:
    try:
        with open(path, encoding="utf-8") as handle:
            return handle.read()
    except OSError:
        return ""


def _fail(termination_log: str, **line: Any) -> int:
    text = json.dumps(line)
    sys.stderr.write(text + "\n")
    try:
        with open(termination_log, "w", encoding="utf-8") as handle:
            handle.write(text[:4000] if len(text) <= 4000 else json.dumps(_short(line)))
    except OSError as err:
        sys.stderr.write(json.dumps({"error": f"cannot write {termination_log}: {err}"}) + "\n")
    return 1


def _short(line: dict[str, Any]) -> dict[str, Any]:
    """The kubelet cuts a termination message at 4096 bytes, which would not be JSON any more."""
    return {"reason": line["reason"], "message": str(line["message"])[:2000]}
