"""The engines behind HTTP: `serve run deployments:app model=FOLDER storage=FOLDER_OR_URI`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from deployments.application import app

__all__ = ["app"]


def __getattr__(name: str) -> object:
    """Load Ray Serve only when the builder is asked for."""
    if name == "app":
        from deployments.application import app

        return app
    raise AttributeError(f"module 'deployments' has no attribute {name!r}")
