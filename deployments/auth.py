"""API keys: authentication, rate limits and owners of stories. Optional on localhost, required everywhere else.

Keys lie hashed in a JSON file (or in the environment variable MINIGPT5_API_KEYS, as the same JSON):

    {"secret": "...", "keys": [{"name": "alice", "sha256": "...", "per_minute": 60, "concurrent": 8}]}

`python -m deployments.auth FILE NAME` adds a key to the file and prints it, once. A key comes as `Authorization: Bearer
KEY`, as from OpenAI's client, or is exchanged for a cookie by `POST /login`, as the studio does. Pictures and books may
also be read by URLs that are signed with the file's secret and expire. A server reads its file again when the file
changes, as Kubernetes changes a mounted secret.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import hmac
import json
import logging
import os
import re
import secrets
import sys
import time
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie
from pathlib import Path
from typing import Any, Protocol

from starlette.types import ASGIApp, Receive, Scope, Send

from deployments.api.errors import error_response, lost_response
from deployments.api.paths import public_path, route_path
from deployments.stories.uninterrupted import uninterrupted
from minigpt5.errors import EngineLost

logger = logging.getLogger("ray.serve")

LOOPBACK = ("127.0.0.1", "::1", "localhost")
VARIABLE = "MINIGPT5_API_KEYS"
COOKIE = "minigpt5"
CLIENT = "minigpt5.client"
"""Where a request's scope has the name of its key."""
SESSION_S = 12 * 3600
URL_S = 24 * 3600
RELOAD_S = 1.0
"""Shortest time between two looks at whether the file has changed."""
GUARDED = "/v1/"
SHA256 = re.compile("[0-9a-f]{64}")
SHARED = (".html", ".epub", ".pdf", ".png", ".jpeg", ".webp")
"""What may be read by a signed URL."""


class KeysError(ValueError):
    """Keys that cannot be used; the message says why and what to do."""


@dataclass(frozen=True, kw_only=True)
class Key:
    """One client."""

    name: str
    sha256: str
    """Hash of the key; the key itself is kept nowhere."""
    per_minute: int = 60
    """Requests that make something; reading is free."""
    concurrent: int = 8
    """How many of those requests may run at once."""


@dataclass
class Keys:
    """The clients that there are."""

    keys: tuple[Key, ...]
    secret: str

    def find(self, given: str) -> Key | None:
        """In constant time, whichever it is."""
        digest = hashlib.sha256(given.encode()).hexdigest()
        found = None
        for key in self.keys:
            if hmac.compare_digest(key.sha256, digest):
                found = key
        return found

    def named(self, name: str) -> Key | None:
        return next((key for key in self.keys if key.name == name), None)

    def sign(self, *parts: object) -> str:
        return hmac.new(self.secret.encode(), "\0".join(map(str, parts)).encode(), hashlib.sha256).hexdigest()

    def is_signed(self, signature: str, *parts: object) -> bool:
        return hmac.compare_digest(self.sign(*parts).encode(), signature.encode())

    def sign_url(self, url: str, *, expires: int | None = None) -> str:
        """A path with its query, readable without a key until `expires`, in seconds since 1970. Without that it is
        good for a day or a little more: the same URL for an hour, so that a browser has it once."""
        if expires is None:
            expires = (int(time.time()) // 3600 + 1) * 3600 + URL_S
        mark = "&" if "?" in url else "?"
        return f"{url}{mark}expires={expires}&signature={self.sign('read', url, expires)}"

    def is_signed_url(self, path: str, query: str) -> bool:
        """Whether `sign_url` has made it, and it has not expired."""
        rest, _, signature = query.rpartition("&signature=")
        rest, _, expires = rest.rpartition("expires=")
        if not _is_to_come(expires):
            return False
        url = f"{path}?{rest.removesuffix('&')}" if rest else path
        return self.is_signed(signature, "read", url, expires)

    def new_session(self, key: Key) -> str:
        expires = int(time.time()) + SESSION_S
        return f"{key.name}.{expires}.{self.sign('session', key.name, key.sha256, expires)}"

    def read_session(self, token: str) -> Key | None:
        name, _, rest = token.partition(".")
        expires, _, signature = rest.partition(".")
        key = self.named(name)
        if not key or not _is_to_come(expires):
            return None
        return key if self.is_signed(signature, "session", name, key.sha256, expires) else None


class KeyFile(Keys):
    """The keys of a file as it is now. A file that cannot be used leaves the keys of before in force."""

    def __init__(self, path: str) -> None:
        """Raises KeysError."""
        self._path, self._looked_at = path, time.monotonic()
        self._version = self._find_version()  # before it is read: a change in between is then seen later
        self._read()

    def _read(self) -> None:
        found = load_keys(self._path)
        assert found
        self.keys, self.secret = found.keys, found.secret

    def find(self, given: str) -> Key | None:
        self._reload()
        return super().find(given)

    def named(self, name: str) -> Key | None:
        self._reload()
        return super().named(name)

    def sign(self, *parts: object) -> str:
        self._reload()
        return super().sign(*parts)

    def _reload(self) -> None:
        """Read the file if it has changed, RELOAD_S after the last look at the earliest."""
        now = time.monotonic()
        if now - self._looked_at < RELOAD_S:
            return
        self._looked_at = now
        version = self._find_version()
        if version == self._version:
            return
        self._version = version  # a file that cannot be used is reported once, not at every look
        try:
            self._read()
            logger.info("read %d API keys from %s", len(self.keys), self._path)
        except KeysError as error:
            logger.warning("the API keys stay as they were: %s", error)

    def _find_version(self) -> tuple[int, ...] | None:
        """Of the file behind every link, for Kubernetes replaces a link and leaves the path; None: no such file."""
        try:
            state = os.stat(self._path)
        except OSError:
            return None
        return state.st_dev, state.st_ino, state.st_mtime_ns, state.st_size


def watch_keys(path: str | None) -> Keys | None:
    """As `load_keys`; those of a file follow the file. Raises KeysError."""
    return KeyFile(path) if path else load_keys(None)


def load_keys(path: str | None) -> Keys | None:
    """From a file or the environment; none where neither says so. Raises KeysError."""
    source, text = path or VARIABLE, os.environ.get(VARIABLE)
    if path:
        try:
            text = Path(path).read_text(encoding="utf-8-sig")  # as editors of Windows save it
        except UnicodeDecodeError as error:
            raise KeysError(f"{path} is not UTF-8 text ({error}): save it as UTF-8") from error
        except OSError as error:
            raise KeysError(
                f"{path} cannot be read ({error.strerror}): make it with python -m deployments.auth {path} NAME"
            ) from error
    if not text and not path:
        return None
    try:
        values = json.loads(text or "")
        keys = tuple(Key(**key) for key in values["keys"])
        secret = values["secret"]
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise KeysError(f"{source} is not what python -m deployments.auth writes: {error}") from error
    problem = _find_problem(keys, secret)
    if problem:
        raise KeysError(f"{source}: {problem}")
    return Keys(keys=keys, secret=secret)


def _find_problem(keys: tuple[Key, ...], secret: object) -> str | None:
    """What is wrong with the values of a file, and what to do. Neither a secret nor a hash, in whose place a person may
    have put the key, is repeated: the answer is logged."""
    if not isinstance(secret, str) or len(secret) < 32 or not secret.isascii():
        return f'"secret" ({_describe(secret)}) must be text of 32 ASCII characters or more: use openssl rand -hex 32'
    if not keys:
        return '"keys" is empty: add one with python -m deployments.auth FILE NAME'
    for number, key in enumerate(keys):
        if not isinstance(key.name, str) or not _is_name(key.name):
            return f'"name" of key {number} is {key.name!r}: use 1 to 64 letters, digits and -'
        if not isinstance(key.sha256, str) or not SHA256.fullmatch(key.sha256):
            return (
                f'"sha256" of {key.name} ({_describe(key.sha256)}) must be 64 digits of 0-9a-f: make the key again '
                f"with python -m deployments.auth FILE NAME"
            )
        for limit in ("per_minute", "concurrent"):
            value = getattr(key, limit)
            if type(value) is not int or value < 1:  # True is an int as well
                return f'"{limit}" of {key.name} is {value!r}: use a whole number from 1'
    names = [key.name for key in keys]
    twice = next((name for name in names if names.count(name) > 1), None)
    return f'the "name" {twice} is there twice: rename one key, or remove it' if twice else None


def _describe(value: object) -> str:
    return f"{len(value)} characters" if isinstance(value, str) else type(value).__name__


def check_host(host: str, keys: Keys | None) -> None:
    """Refuse an address that others can reach where there are no API keys: every client could do everything. Raises
    KeysError."""
    if keys is None and host not in LOOPBACK:
        raise KeysError(
            f"host is {host}, which others can reach, and there are no API keys: make some with "
            f"python -m deployments.auth keys.json NAME and name the file: --api-keys keys.json, or api_keys in the "
            f"application's args, or their JSON in {VARIABLE}"
        )


def _is_to_come(expires: str) -> bool:
    """Whether a moment, in seconds since 1970, is one and not past."""
    return expires.isascii() and expires.isdecimal() and len(expires) <= 12 and int(expires) > time.time()


def _is_name(name: str) -> bool:
    return 1 <= len(name) <= 64 and name.isascii() and name.replace("-", "a").isalnum()


class Quota(Protocol):
    """What keys have used, at whichever front."""

    async def begin(self, key: Key) -> float:
        """Count a request that makes something: 0, or the seconds after which it may come again."""

    async def end(self, key: Key) -> None:
        """It is done."""


class KeyGuard:
    """Lets nobody without a key through, before anything of the request is read."""

    def __init__(self, app: ASGIApp, *, keys: Keys, quota: Quota) -> None:
        self.app, self.keys, self.quota = app, keys, quota

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not route_path(scope).startswith(GUARDED):
            return await self.app(scope, receive, send)
        key = self._key(scope)
        if key is None:
            if self._is_shared(scope):
                return await self.app(scope, receive, send)
            message = f"this server asks for a key: send Authorization: Bearer KEY, or log in at {public_path('/')}"
            refusal = error_response(
                401, message, code="invalid_api_key", headers={"WWW-Authenticate": 'Bearer realm="minigpt5"'}
            )
            return await refusal(scope, receive, send)
        scope[CLIENT] = key.name
        if scope["method"] in ("GET", "HEAD", "DELETE") or route_path(scope).endswith("/cancel"):
            return await self.app(scope, receive, send)
        wait_s: float | None = None

        async def begin() -> None:
            nonlocal wait_s
            wait_s = await self.quota.begin(key)

        try:
            try:
                await uninterrupted(begin())  # who leaves meanwhile is counted, and must be counted as done
            except EngineLost as failure:
                return await lost_response(failure)(scope, receive, send)
            if wait_s:
                message = f"key {key.name} may make {key.per_minute} requests a minute and {key.concurrent} at once"
                headers = {"Retry-After": str(max(1, round(wait_s)))}
                refusal = error_response(429, message, code="rate_limit_exceeded", headers=headers)
                return await refusal(scope, receive, send)
            await self.app(scope, receive, send)
        finally:
            if wait_s == 0:
                await uninterrupted(self.quota.end(key))

    def _key(self, scope: Scope) -> Key | None:
        headers = dict(scope["headers"])
        scheme, _, given = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
        if scheme.lower() == "bearer":
            return self.keys.find(given.strip())
        with contextlib.suppress(CookieError):
            cookie = SimpleCookie(headers.get(b"cookie", b"").decode("latin-1")).get(COOKIE)
            if cookie:
                return self.keys.read_session(cookie.value)
        return None

    def _is_shared(self, scope: Scope) -> bool:
        """Whether it is read by a signed URL."""
        path = route_path(scope)
        if scope["method"] not in ("GET", "HEAD") or not path.endswith(SHARED):
            return False
        if not self.keys.is_signed_url(path, scope["query_string"].decode("latin-1")):
            return False
        scope[CLIENT] = None
        return True


def session_cookie(keys: Keys, key: Key, *, is_secure: bool) -> str:
    attributes = (
        f"Path={public_path('/')}; Max-Age={SESSION_S}; HttpOnly; SameSite=Strict{'; Secure' if is_secure else ''}"
    )
    return f"{COOKIE}={keys.new_session(key)}; {attributes}"


def add_key(path: Path, name: str, *, per_minute: int, concurrent: int) -> str:
    """Write a new key's hash into the file, which is made where it is not there; returns the key. Raises KeysError."""
    values: dict[str, Any] = {"secret": secrets.token_hex(32), "keys": []}
    if path.exists():
        load_keys(str(path))
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    for limit, value in (("--per-minute", per_minute), ("--concurrent", concurrent)):
        if value < 1:
            raise KeysError(f"{limit} is {value}: use a whole number from 1")
    if not _is_name(name) or any(key["name"] == name for key in values["keys"]):
        raise KeysError(f"{name!r} is taken, or is no name: use letters, digits and -")
    given = f"mg5-{secrets.token_urlsafe(32)}"
    digest = hashlib.sha256(given.encode()).hexdigest()
    values["keys"].append({"name": name, "sha256": digest, "per_minute": per_minute, "concurrent": concurrent})
    written = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    written.touch(mode=0o600)
    written.write_text(json.dumps(values, indent=1) + "\n")
    written.replace(path)
    return given


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m deployments.auth", description="Add an API key to a file.")
    parser.add_argument("file", type=Path)
    parser.add_argument("name", help="of the client: letters, digits and -")
    parser.add_argument("--per-minute", type=int, default=Key.per_minute, help="(default %(default)s)")
    parser.add_argument("--concurrent", type=int, default=Key.concurrent, help="(default %(default)s)")
    options = parser.parse_args()
    try:
        given = add_key(options.file, options.name, per_minute=options.per_minute, concurrent=options.concurrent)
    except KeysError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{given}\nIt is shown this once; {options.file} has its hash.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
