"""The broker's HTTPS API (docs/interfaces.md section 8): fetch the facts, ask `policy`, sign, answer."""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from aiohttp import web

from cowhand.api import labels
from cowhand.broker import policy
from cowhand.broker.keys import KeyStore
from cowhand.broker.secrets import ModelKeys
from cowhand.errors import Denied, Retryable, SessionNotFound, UserError
from cowhand.kube import kinds
from cowhand.kube.client import Kube
from cowhand.kube.review import STATUS, Caller, Refusal, Reviewer, check_pod_account
from cowhand.session.log import ControlLog, HandRecord, SessionLog
from cowhand.session.slots import ModelSlots
from cowhand.telemetry.metrics import count_request
from cowhand.wire.keys import dump_keys
from cowhand.wire.records import sign_record, verify_record
from cowhand.wire.tokens import MAX_LIFETIME_S, HandClaims, sign

log = logging.getLogger(__name__)

MAX_BODY: Final = 64 * 1024

T = TypeVar("T")


class Refused(Exception):
    """Carries a Refusal out of a handler."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.message)
        self.refusal = refusal


def allowed(verdict: T | Refusal) -> T:
    """The verdict itself; raises Refused if it is a Refusal."""
    if isinstance(verdict, Refusal):
        raise Refused(verdict)
    return verdict


@dataclass(frozen=True)
class Names:
    """Whom the broker serves.

    Attributes:
        tenants: namespaces.
        gateway: user name of the gateway's service account.
        harness: service account of harness pods.
        sandbox: service account of sandbox pods.
    """

    tenants: Sequence[str]
    gateway: str
    harness: str
    sandbox: str


@dataclass(frozen=True)
class Sharing:
    """How tenants share a model workspace.

    Attributes:
        slots: where the requests that are under way are counted.
        limit: requests to one workspace at the same time.
        weights: tenant -> its share; 1 for those that are not named.
    """

    slots: ModelSlots
    limit: int
    weights: Mapping[str, float]


class Broker:
    """The handlers, over what they need.

    Args:
        kube: the Kubernetes API.
        sessions: the session log of a tenant.
        control: hand records.
        keys: signing keys.
        names: whom to serve.
        sharing: None: nobody waits for a slot.
        clock: seconds since the epoch.
    """

    def __init__(
        self,
        *,
        kube: Kube,
        sessions: Callable[[str], SessionLog],
        control: ControlLog,
        keys: KeyStore,
        names: Names,
        sharing: Sharing | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._kube = kube
        self._sessions = sessions
        self._control = control
        self._keys = keys
        self._names = names
        self._sharing = sharing
        self._clock = clock
        self._reviewer = Reviewer(kube, labels.AUDIENCE_BROKER)
        self._model_keys = ModelKeys(kube)

    def application(self) -> web.Application:
        """The aiohttp application."""
        app = web.Application(client_max_size=MAX_BODY)
        app.on_response_prepare.append(_count)
        app.router.add_post("/v1/register", self._route(self.register))
        app.router.add_post("/v1/hand-token", self._route(self.hand_token))
        app.router.add_post("/v1/exec-token", self._route(self.exec_token))
        app.router.add_post("/v1/model-credential", self._route(self.model_credential))
        app.router.add_post("/v1/model-slots", self._route(self.model_slots))
        app.router.add_get("/v1/keys", self._public_keys)
        app.router.add_get("/healthz", self._health)
        return app

    async def register(self, caller: Caller, body: Mapping[str, Any], peer: str) -> dict[str, Any]:
        """A sandbox pod announces its proxy; its signed record is written."""
        self._only(caller, self._names.sandbox)
        asked = allowed(policy.registration_of(body))
        pod = await self._kube.get(kinds.POD, caller.namespace, caller.pod_name)
        refusal = policy.check_pod(caller, pod)
        if refusal is not None or pod is None:
            raise Refused(refusal or Refusal("forbidden", "There is no such pod."))
        owner = policy.sandbox_owner(pod)
        sandbox, previous = None, None
        if owner is not None:
            sandbox = await self._kube.get(kinds.SANDBOX, caller.namespace, owner[0])
            previous = await self._trusted_record(caller.namespace, owner[1])
        record = allowed(policy.hand_record(pod, sandbox, peer, asked, previous))
        signature = sign_record(record, self._keys.signing, namespace=caller.namespace)
        await self._control.put_hand(
            caller.namespace, dataclasses.replace(record, signature=signature)
        )
        # A record never comes back from Lost: the store may have kept its own.
        stored = await self._control.get_sandbox(caller.namespace, record.sandbox_uid)
        if stored is None or stored.state != "Ready" or stored.pod_uid != record.pod_uid:
            raise Refused(Refusal("forbidden", "This sandbox was declared lost in the meantime."))
        log.info(
            "registered",
            extra={"sandbox": record.sandbox, "session": record.owner, "pod": caller.pod_name},
        )
        return {
            "sandbox_uid": record.sandbox_uid,
            "session_id": record.owner,
            "hand": record.hand,
            "instance": record.instance,
            "owner_epoch": record.owner_epoch,
        }

    async def hand_token(self, caller: Caller, body: Mapping[str, Any], _: str) -> dict[str, Any]:
        """A token for the worker that holds the session's lease, for a sandbox that the session owns."""
        session_id, epoch, _state = await self._leased(caller, body)
        sandbox_uid = body.get("sandbox_uid")
        if not isinstance(sandbox_uid, str) or not 0 < len(sandbox_uid) <= 256:
            raise Refused(Refusal("invalid", "sandbox_uid must be the uid of a Sandbox."))
        record = await self._trusted_record(caller.namespace, sandbox_uid)
        owned = allowed(policy.owned_hand(record, session_id))
        now = int(self._clock())
        return self._token(
            HandClaims(
                sandbox_uid=sandbox_uid,
                session_id=session_id,
                owner_epoch=owned.owner_epoch,
                epoch=epoch,
                issued_at=now,
                expires_at=now + MAX_LIFETIME_S,
            )
        )

    async def exec_token(self, caller: Caller, body: Mapping[str, Any], _: str) -> dict[str, Any]:
        """A token for one command of a person, whom the gateway has authorised."""
        asked = allowed(policy.exec_request(caller, body, self._names.gateway, self._names.tenants))
        record = await self._trusted_record(asked.namespace, asked.sandbox_uid)
        if record is None or record.state != "Ready":
            raise Refused(Refusal("not_found", "There is no such sandbox, or it is not ready."))
        now = int(self._clock())
        log.info("exec token", extra={"sandbox": record.sandbox, "actor": asked.actor})
        return self._token(
            HandClaims(
                sandbox_uid=asked.sandbox_uid,
                session_id=record.owner,
                owner_epoch=record.owner_epoch,
                epoch=0,
                issued_at=now,
                expires_at=now + MAX_LIFETIME_S,
                type="exec",
                actor=asked.actor,
            )
        )

    async def model_credential(
        self, caller: Caller, body: Mapping[str, Any], _: str
    ) -> dict[str, Any]:
        """The model's endpoint and key for a session whose lease the calling pod holds."""
        _session, _epoch, model = await self._leased(caller, body)
        rejected = body.get("rejected", "")
        if not isinstance(rejected, str):
            raise Refused(Refusal("invalid", "rejected must be the id of a credential."))
        answer = allowed(await self._model_keys.credential(caller.namespace, model, rejected))
        if self._sharing is None:
            del answer["pool"]
        return answer

    async def model_slots(self, caller: Caller, body: Mapping[str, Any], _: str) -> dict[str, Any]:
        """Which of a proxy's requests may be sent, so that no tenant takes a workspace for itself.

        The tenant is the calling pod's own, whatever it says; a pool that is not its own it cannot name.
        """
        self._only(caller, self._names.harness)
        pool, asked = allowed(policy.slots_asked(body))
        if self._sharing is None:
            return {"granted": list(asked.wanted), "pause_ms": 0}
        answer = await self._sharing.slots.ask(
            pool,
            caller.namespace,
            asked,
            limit=self._sharing.limit,
            weight=self._sharing.weights.get(caller.namespace, 1.0),
        )
        return {"granted": list(answer.granted), "pause_ms": answer.pause_ms}

    def _only(self, caller: Caller, account: str) -> None:
        refusal = check_pod_account(caller, account, self._names.tenants)
        if refusal is not None:
            raise Refused(refusal)

    async def _leased(
        self, caller: Caller, body: Mapping[str, Any]
    ) -> tuple[str, int, Mapping[str, Any]]:
        """Session id, epoch and frozen model of a session whose live lease the caller holds."""
        self._only(caller, self._names.harness)
        session_id, lease = allowed(policy.session_named(body))
        state = await self._sessions(caller.namespace).get_session(session_id)
        return session_id, allowed(policy.lease_epoch(caller, state, lease)), state.meta.model

    async def _trusted_record(self, namespace: str, sandbox_uid: str) -> HandRecord | None:
        """The newest record of a sandbox if we signed it, or if it says that the sandbox is lost.

        A tenant's harness can write its tenant's keys: what we did not sign opens nothing.
        """
        record = await self._control.get_sandbox(namespace, sandbox_uid)
        if record is None or record.sandbox_uid != sandbox_uid or record.state == "Lost":
            return record if record is not None and record.state == "Lost" else None
        try:
            verify_record(record, self._keys.public, namespace=namespace)
        except Denied:
            return None
        return record

    def _token(self, claims: HandClaims) -> dict[str, Any]:
        key = self._keys.signing
        life = claims.expires_at - claims.issued_at
        return {"token": sign(claims, key), "expires_in_s": life, "kid": key.kid}

    async def _public_keys(self, _: web.Request) -> web.Response:
        return web.json_response(dump_keys(self._keys.public.values()))

    async def _health(self, _: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    def _route(
        self, handler: Callable[[Caller, Mapping[str, Any], str], Awaitable[dict[str, Any]]]
    ) -> Callable[[web.Request], Awaitable[web.Response]]:
        """Authenticate, read the body, run a handler, and turn what it raises into our answers."""

        async def handle(request: web.Request) -> web.Response:
            try:
                header = request.headers.getall("Authorization", [])
                caller = allowed(await self._reviewer.caller(header[0] if len(header) == 1 else ""))
                answer = await handler(caller, await _body(request), request.remote or "")
                return web.json_response(answer)
            except Refused as err:
                refusal = err.refusal
            except SessionNotFound:
                refusal = Refusal("not_found", "There is no such session in this namespace.")
            except Retryable as err:
                refusal = Refusal("unavailable", str(err))
            except UserError as err:
                refusal = Refusal("invalid", str(err))
            except Denied as err:
                # Of the API server or the store, against us: our rights are missing, not the caller's.
                refusal = Refusal("unavailable", f"The broker lacks a right: {err}")
            except web.HTTPException:
                raise
            except Exception as err:
                # The text of an unknown error may quote a secret; its type is enough.
                log.error(
                    "request failed", extra={"path": request.path, "error": type(err).__name__}
                )
                refusal = Refusal("unavailable", "The broker failed; see its log.")
            log.info(
                "refused",
                extra={"path": request.path, "type": refusal.type, "reason": refusal.message},
            )
            return _refused(refusal)

        return handle


async def _count(request: web.Request, response: web.StreamResponse) -> None:
    resource = request.match_info.route.resource
    count_request(resource.canonical if resource is not None else None, response.status)


async def _body(request: web.Request) -> Mapping[str, Any]:
    try:
        body = json.loads(await request.read())
    except (ValueError, RecursionError):
        body = None
    if not isinstance(body, dict):
        raise Refused(Refusal("invalid", "Send a JSON object."))
    return body


def _refused(refusal: Refusal) -> web.Response:
    status = STATUS[refusal.type]
    headers = {"retry-after": "2"} if status == 503 else {}
    error = {"error": {"type": refusal.type, "message": refusal.message}}
    return web.json_response(error, status=status, headers=headers)
