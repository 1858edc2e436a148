"""Following a session from the terminal: read, draw, reconnect, stop at the right event.

A broken connection (port-forward gone, gateway replaced) is not the user's problem: reading goes on behind
the last position that was shown.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from cowhand.cli import connection, render
from cowhand.cli.client import Client, GatewayUnavailable
from cowhand.cli.connection import Target
from cowhand.cli.live import Live
from cowhand.cli.tunnel import TunnelFailed
from cowhand.errors import CowhandError, SessionNotFound

RETRY_S: Final = 60.0
"""How long a broken connection is tried again before the command gives up."""
PAUSE_S: Final = 1.0

EXIT_OK: Final = 0
EXIT_FAILED: Final = 1
EXIT_WAITS: Final = 3
"""The turn waits for an approval."""

Json = dict[str, Any]


@dataclass
class Turn:
    """Whether a session is at rest, folded from its raw events.

    Attributes:
        stop: type of the last stop reason; empty while a turn runs or input waits.
        ended: the log ends here.
    """

    stop: str = ""
    ended: bool = False
    seq: int = 0

    def feed(self, event: Mapping[str, Any]) -> None:
        """Take the next event."""
        kind = event["type"]
        self.seq = int(event["seq"])
        if kind == "session.status_idle":
            data = (event.get("payload") or {}).get("d") or {}
            self.stop = str((data.get("stop_reason") or {}).get("type") or "end_turn")
        elif kind.startswith("user.") or kind in ("session.status_running", "session.resumed"):
            self.stop = ""
        elif kind in ("session.status_terminated", "session.deleted"):
            self.ended = True

    def at_rest(self, upto: int) -> bool:
        """Whether everything up to a position has been seen, and nothing runs."""
        return self.ended or (self.seq >= upto and bool(self.stop))

    def exit_code(self) -> int:
        """0 after a whole turn, 3 when it waits for an approval, 1 otherwise."""
        if self.stop in ("end_turn", "interrupted", "suspended"):
            return EXIT_OK
        return EXIT_WAITS if self.stop == "requires_action" else EXIT_FAILED


class Source:
    """Events of one session, over as many connections as it takes."""

    def __init__(self, to: Target, session_id: str) -> None:
        self._to = to
        self.session_id = session_id

    def session(self) -> Json:
        """The session object."""
        with connection.connect(self._to) as client:
            return client.call("GET", f"/v1/sessions/{self.session_id}")

    def raw(
        self,
        start: int,
        *,
        follow: bool,
        end: int | None = None,
        types: Sequence[str] = (),
        previews: bool = False,
    ) -> Iterator[tuple[Json, Json]]:
        """(session object, event) for each event of the raw log from `start` on.

        The session object is as it was when the connection was made. Negative positions count from the end; `types`
        keeps only events of these types. With `previews` also `{"preview":{"start","block","offset","text","kind"?}}`
        in the place of an event: text or thinking that is still being written.

        Raises:
            GatewayUnavailable: no connection for 60 s, or (without `follow`) once.
            CowhandError: what the gateway refuses.
        """
        position = start

        def read(client: Client) -> Generator[tuple[Json, Json], None, None]:
            nonlocal position
            session = client.call("GET", f"/v1/sessions/{self.session_id}")
            query = {"start": str(position), "follow": "true" if follow else "false"}
            query |= {"end": str(end)} if end is not None else {}
            query |= {"types": ",".join(types)} if types else {}
            query |= {"previews": "true", "thinking": "true"} if previews and follow else {}
            for line in client.lines(f"/v1/sessions/{self.session_id}/log", query):
                if not line:
                    continue
                event = json.loads(line)
                if "error" in event:
                    raise GatewayUnavailable(str(event["error"].get("message")))
                yield session, event
                if "preview" in event:
                    continue
                position = int(event["seq"]) + 1
                if event["type"] == "session.deleted":
                    return

        yield from self._persist(read, follow=follow)

    def public(self, *, follow: bool, after: str = "0") -> Iterator[Json | None]:
        """Public events (the projection), oldest first; None when a followed session is silent."""
        path = f"/v1/sessions/{self.session_id}/events"
        position = after

        def pages(client: Client) -> Generator[Json, None, None]:
            page = ""
            while True:
                found = client.call("GET", path, query={"page": page} if page else None)
                yield from found["data"]
                page = found.get("next_page") or ""
                if not page:
                    return

        def stream(client: Client) -> Generator[Json | None, None, None]:
            nonlocal position
            headers = {"Last-Event-ID": position}
            for line in client.lines(f"{path}/stream", {}, headers):
                if line.startswith(b"id: "):
                    position = line[4:].decode()
                elif line.startswith(b"data: "):
                    event = json.loads(line[6:])
                    if event["type"] == "error":
                        raise GatewayUnavailable(str(event["error"].get("message")))
                    yield None if event["type"] == "ping" else event
                    if event["type"] in ("session.deleted", "session.status_terminated"):
                        return

        yield from self._persist(stream if follow else pages, follow=follow)

    def _persist(
        self, read: Callable[[Client], Generator[Any, None, None]], *, follow: bool
    ) -> Iterator[Any]:
        """Whatever `read` yields; it is called again when a followed connection breaks."""
        broken_since: float | None = None
        while True:
            try:
                with (
                    connection.connect(self._to) as client,
                    contextlib.closing(read(client)) as items,
                ):
                    for item in items:
                        broken_since = None
                        yield item
                if not follow or self._over():
                    return
            except (GatewayUnavailable, TunnelFailed) as err:
                if not follow:
                    raise
                now = time.monotonic()
                if broken_since is None:
                    print(f"cowhand: {err}; trying again", file=sys.stderr)
                broken_since = broken_since or now
                if now - broken_since > RETRY_S:
                    raise
            time.sleep(PAUSE_S)

    def _over(self) -> bool:
        """Whether a stream that ended cleanly ended because the session did (a gateway may just restart)."""
        try:
            state = self.session()["cowhand"]["state"]
        except SessionNotFound:
            return True
        except (GatewayUnavailable, TunnelFailed):
            return False
        return state in ("terminated", "closed")


@dataclass(frozen=True)
class Options:
    """Of `cowhand events`.

    Attributes:
        form: `text`, `raw` (lines of the raw log) or `json` (public events).
        follow: go on with new events.
        until_idle: end with the turn.
        start: first position; negative: from the end.
        style: how text is drawn.
        end: last position, None for the newest.
        types: types of the raw log to show, empty for all.
        previews: show text while it is written; in a terminal only.
    """

    form: str
    follow: bool
    until_idle: bool
    start: int
    style: render.Style
    end: int | None = None
    types: tuple[str, ...] = ()
    previews: bool = True


def show(to: Target, session_id: str, options: Options) -> int:
    """Print the events of a session; answers the exit code."""
    source = Source(to, session_id)
    if options.form == "json":
        return _show_public(source, options)
    turn = Turn()
    calls: dict[str, str] = {}
    follow = options.follow or options.until_idle
    # Where the end of the turn counts, the events that tell it must come too: then the filter is ours.
    asked = () if options.until_idle else options.types
    previews = options.previews and follow and options.form == "text" and sys.stdout.isatty()
    live = Live(options.style.width)
    for session, event in source.raw(
        options.start, follow=follow, end=options.end, types=asked, previews=previews
    ):
        if "preview" in event:
            print(live.feed(event["preview"]), end="", flush=True)
            continue
        print(live.clear(), end="")
        turn.feed(event)
        if options.types and event["type"] not in options.types:
            pass
        elif options.form == "raw":
            print(dump(event), flush=True)
        else:
            calls.update(render.calls_of(event))
            for line in render.render(event, start_ms(session), options.style, calls):
                print(line, flush=True)
        if options.until_idle and turn.at_rest(int(session["cowhand"]["last_seq"])):
            return turn.exit_code()
    return EXIT_OK


def _show_public(source: Source, options: Options) -> int:
    """As `show`, with public events; positions are not in these, so silence tells that nothing follows."""
    follow = options.follow or options.until_idle
    turn = Turn()
    newest = str(source.session()["updated_at"]) if options.until_idle else ""
    for event in source.public(follow=follow, after=str(options.start - 1)):
        if event is not None:
            print(dump(event), flush=True)
            turn.feed({"seq": 0, **event, "payload": {"d": event}})
        reached = event is None or str(event["processed_at"] or "") >= newest
        if options.until_idle and reached and (turn.stop or turn.ended):
            return turn.exit_code()
    return EXIT_OK


def dump(event: Json) -> str:
    """An event as one line of JSON; ASCII only for a terminal, which must not act on what it holds."""
    return json.dumps(event, ensure_ascii=sys.stdout.isatty(), separators=(",", ":"))


def start_ms(session: Mapping[str, Any]) -> int:
    """When a session was created, milliseconds since the epoch."""
    return round(datetime.fromisoformat(str(session["created_at"])).timestamp() * 1000)


def style(color: str, *, full: bool, verbose: bool) -> render.Style:
    """The style for this terminal; `color` is auto, always or never."""
    tty = sys.stdout.isatty()
    width = shutil.get_terminal_size((100, 24)).columns if tty else 120
    return render.Style(color == "always" or (color == "auto" and tty), full, verbose, width)


def wait_quietly(to: Target, session_id: str) -> int:
    """Wait for the end of the turn, then print Claude's last words; answers the exit code."""
    turn, words = Turn(), ""
    for session, event in Source(to, session_id).raw(1, follow=True):
        turn.feed(event)
        if event["type"] == "model.response":
            blocks = event["payload"]["d"]["message"].get("content") or ()
            said = [block["text"] for block in blocks if block.get("type") == "text"]
            words = "\n".join(said) or words
        if turn.at_rest(int(session["cowhand"]["last_seq"])):
            break
    if not turn.stop and not turn.ended:
        raise CowhandError("the log ended before the turn did")
    print(render.safe(words))
    return turn.exit_code()
