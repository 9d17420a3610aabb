"""The paths of requests and of URLs in replies, wherever Serve has put the application."""

from __future__ import annotations

from contextvars import ContextVar

from starlette.types import Scope

_root: ContextVar[str] = ContextVar("root", default="")


def route_path(scope: Scope) -> str:
    """The path that the routes know. Serve leaves an application's `route_prefix` in `path`, and names it in
    `root_path`: a check of `path` alone would let everything pass."""
    path, root = str(scope["path"]), _root_of(scope)
    return path[len(root) :] if path.startswith(f"{root}/") else path


def enter_application(scope: Scope) -> None:
    """Answer this request from now on: `public_path` is where its client finds the application."""
    _root.set(_root_of(scope))


def public_path(path: str) -> str:
    """A path that the routes know -> the one that a client asks for."""
    return f"{_root.get()}{path}"


def _root_of(scope: Scope) -> str:
    return str(scope.get("root_path", "")).rstrip("/")
