"""Users of the store: which keys, channels and commands each of our processes may use.

Pure. `cowhand bootstrap` renders the store's `users.acl` with it, and the tests start a real server with
the same text. The commands are an allowlist: everything else, above all `@admin` and `@dangerous`
(CONFIG, FLUSHALL, KEYS, ACL, DEBUG, ...), is refused. The server checks the commands inside of a script
against the caller's own rules too, so a tenant's script cannot reach another tenant's keys.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Final

from cowhand.errors import UserError

CONTROL_USERS: Final = ("operator", "broker", "gateway", "archive")
"""Users of the control plane: every tenant's keys."""

COMMANDS: Final = (
    # connection
    *("auth", "hello", "ping", "quit", "select", "echo", "time", "wait", "waitaof"),
    *("client|setname", "client|id"),
    # where the slots of a cluster are, and a slot that is on its way
    *("cluster|slots", "asking"),
    # scripts that the control plane has loaded
    *("evalsha", "script|exists"),
    # strings and keys
    *("get", "set", "del", "unlink", "exists", "expire", "pexpire", "persist", "pttl", "type"),
    # hashes, sets, sorted sets
    *("hget", "hmget", "hgetall", "hkeys", "hset", "hsetnx", "hdel", "hexists", "hlen"),
    *("sadd", "srem", "spop", "smembers", "scard", "sismember"),
    *("zadd", "zrem", "zscore", "zcard", "zcount", "zrange", "zremrangebyscore"),
    # streams
    *("xadd", "xlen", "xrange", "xrevrange", "xtrim", "xack", "xautoclaim", "xpending"),
    *("xreadgroup", "xgroup|create", "xgroup|delconsumer"),
    *("xinfo|groups", "xinfo|stream", "xinfo|consumers"),
    # nudges
    *("publish", "subscribe", "unsubscribe"),
)
"""What every user may call, on keys and channels of its own."""

CONTROL_COMMANDS: Final = ("scan", "script|load", "memory|usage", "info", "rename")
"""What only the control plane may call.

SCAN and INFO tell of all tenants; MEMORY USAGE is for quotas and the archive. A script of one's own may be
endless, or meet a flaw of the server's Lua engine: tenants run those alone that the control plane has loaded.
RENAME puts a restored log in its place.
"""

_SHA256 = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")


def tenant_user(namespace: str) -> str:
    """Name of the store user of a tenant: `t-<namespace>`."""
    return f"t-{namespace}"


def acl_rule(user: str, password_sha256: str, *, prefix: str = "cowhand") -> str:
    """One line of `users.acl`.

    Args:
        user: `operator`, `broker`, `gateway`, `archive` or `t-<namespace>`.
        password_sha256: hex SHA-256 of the password, lower case.
        prefix: first part of every key.

    Raises:
        UserError: a name or a hash that would not be safe in an ACL file.
    """
    if not _SHA256.fullmatch(password_sha256):
        raise UserError(f"password of store user {user} is not given as hex SHA-256")
    if not _NAME.fullmatch(prefix):
        raise UserError(f"store prefix {prefix!r} is not a DNS label", field="prefix")
    commands: tuple[str, ...] = COMMANDS
    head = f"user {user} on #{password_sha256} resetkeys resetchannels"
    if user in CONTROL_USERS:
        scope = f"~{prefix}:* &{prefix}:*"
        commands += CONTROL_COMMANDS
    elif user.startswith("t-") and _NAME.fullmatch(user[2:]):
        tenant = f"{prefix}:{user[2:]}"
        scope = f"~{tenant}:* %R~{prefix}:gen %R~{prefix}:{{p??}}:gen %R~{prefix}:{{p??}}:quota.{user[2:]} &{tenant}:*"
    else:
        known = ", ".join(CONTROL_USERS)
        raise UserError(f"store user {user!r} is none of {known} or t-<namespace>")
    allowed = " ".join(f"+{command}" for command in commands)
    return f"{head} {scope} -@all {allowed}"


def users_acl(passwords: Mapping[str, str], tenants: Sequence[str], prefix: str = "cowhand") -> str:
    """The whole `users.acl`: default user off, the control plane's users, one user for each tenant.

    Args:
        passwords: user name -> hex SHA-256 of its password; needs the control plane's users and
            `t-<namespace>` of each tenant; others are left out.
        tenants: namespaces that are served.
        prefix: first part of every key.

    Raises:
        UserError: a user has no password, or a name or hash is malformed.
    """
    users = (*CONTROL_USERS, *(tenant_user(namespace) for namespace in tenants))
    missing = [user for user in users if user not in passwords]
    if missing:
        raise UserError(f"no password for store user {', '.join(missing)}")
    # Off and without a password, so that nobody can be this user; but with rights, because the server replays
    # its append-only file as this user and would drop every transaction that the user may not run.
    lines = ["user default off resetpass ~* &* +@all"]
    lines += [acl_rule(user, passwords[user], prefix=prefix) for user in users]
    return "\n".join(lines) + "\n"
