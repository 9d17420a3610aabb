"""The path of a request, wherever Serve has put the application."""

from __future__ import annotations

from starlette.types import Scope


def route_path(scope: Scope) -> str:
    """The path that the routes know. Serve leaves an application's `route_prefix` in `path`, and names it in
    `root_path`: a check of `path` alone would let everything pass."""
    path, root = str(scope["path"]), str(scope.get("root_path", "")).rstrip("/")
    return path[len(root) :] if path.startswith(f"{root}/") else path
