"""Checkpoints of a run: complete or not there, read back with weights_only. The two newest are kept.

A run writes them in the background: see CheckpointWriter.
"""

from __future__ import annotations

import io
import json
import secrets
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minigpt5.errors import TrainingError
from training.run_folder import RunFolder

PREFIX = "checkpoint-"
KEPT = 2
OWNER, RUN = "owner", "run.json"


@dataclass
class Position:
    """How far a run is."""

    step: int = 0
    elapsed_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class RunIdentity:
    """What makes a run this run: a folder resumes no other. What may change is not in it: the length, the rates, the
    number of workers.

    Example: RunIdentity(stage="align", start="3f2a", decoder="", data="/data/cc3m (900 rows)", data_digest="9be1",
    seed=42, examples_per_step=48)
    """

    stage: str
    start: str
    """Fingerprint of the model folder that the run starts from; empty: parts that earlier stages left."""
    decoder: str
    """Folder that replaces the start's decoder; empty: none."""
    data: str
    """Where the examples lie, for messages: rows may be moved."""
    data_digest: str
    """Changes with the examples."""
    seed: int
    examples_per_step: int
    """A position counts steps: with another number the same examples would come again, or some never."""


def check_identity(folder: RunFolder, identity: RunIdentity) -> None:
    """Write down which run a folder belongs to. Raises TrainingError where its checkpoints are another run's.

    A folder of an earlier version does not say whose it is, and is taken as it is.
    """
    before: dict[str, Any] = json.loads(folder.read(RUN) or b"{}") if checkpoints(folder) else {}
    now = vars(identity)
    different = [name for name in now if name != "data" and name in before and before[name] != now[name]]
    if different:
        shown = {"data_digest": "data"}
        pairs = [
            f"{name} was {before.get(name)!r} and is {now[name]!r}"
            if before.get(name) != now[name]
            else f"{name} {now[name]!r} has other files than before"
            for name in (shown.get(one, one) for one in different)
        ]
        raise TrainingError(
            f"{folder.uri} holds another run: {'; '.join(pairs)}. Name another folder with --out, or give the command "
            "of that run again"
        )
    folder.write(RUN, json.dumps(now, indent=1).encode())


def save_checkpoint(folder: RunFolder, position: Position, state: dict[str, Any], average: dict[str, Tensor]) -> str:
    """Write `checkpoint-<step>`, complete or not at all; the newest ones are kept. Returns its name.

    `state` holds what is trained and its optimizer. Raises TrainingError where it cannot be written, a full disk
    included: the earlier checkpoints stay as they are.
    """
    name = f"{PREFIX}{position.step:08d}"
    if name in checkpoints(folder):
        return name
    try:
        content = io.BytesIO()
        torch.save({**state, "average": average}, content)
        folder.write(f"{name}/state.pt", content.getbuffer())
        folder.write(f"{name}/position.json", json.dumps(vars(position)).encode())  # last: it says that all is there
    except TrainingError as failure:
        folder.drop(name)
        kept = checkpoints(folder)
        last = f"{kept[-1]} is kept" if kept else "there is no earlier one"
        raise TrainingError(f"{failure}; {last}") from failure
    for old in checkpoints(folder)[:-KEPT]:
        folder.drop(old)
    return name


def copy_to_host(value: Any) -> Any:
    """Copy every tensor of nested dicts and lists to the host's memory."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: copy_to_host(one) for key, one in value.items()}
    return [copy_to_host(one) for one in value] if isinstance(value, list) else value


class CheckpointWriter:
    """Writes the checkpoints of the run with the token `owner` in a thread: training goes on meanwhile. A checkpoint
    waits for the one before it, so that at most one is on its way."""

    def __init__(self, folder: RunFolder, owner: str) -> None:
        self.folder, self.owner = folder, owner
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._last: Future[None] | None = None

    def write(self, position: Position, state: dict[str, Any], average: dict[str, Tensor]) -> None:
        """Begin a checkpoint of tensors that nobody changes any more. Raises as `finish` does."""
        self.finish()
        self._last = self._thread.submit(self._write, position, state, average)

    def _write(self, position: Position, state: dict[str, Any], average: dict[str, Tensor]) -> None:
        check_owner(self.folder, self.owner)
        save_checkpoint(self.folder, position, state, average)

    def raise_failure(self) -> None:
        """Raise TrainingError where the last checkpoint is known to have failed; see `save_checkpoint`."""
        if self._last and self._last.done():
            self.finish()

    def finish(self) -> None:
        """Wait for the last checkpoint. Raises TrainingError, once, where it failed."""
        last, self._last = self._last, None
        if last:
            last.result()


def load_checkpoint(
    folder: RunFolder, trained: Iterable[str], *, name: str | None = None
) -> tuple[dict[str, Any] | None, Position]:
    """The state, on the CPU, and the position of a checkpoint of `folder`, the newest where none is named; None where
    there is none. Raises TrainingError where another model wrote it."""
    found = [name] if name else checkpoints(folder)
    if not found:
        return None, Position()
    content = folder.read(f"{found[-1]}/state.pt")
    position = folder.read(f"{found[-1]}/position.json")
    assert content is not None and position is not None
    state = torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")
    if set(state["trained"]) != set(trained):
        different = sorted(set(state["trained"]) ^ set(trained))[:5]
        raise TrainingError(
            f"{found[-1]} of {folder.uri} was written by another model: {different} differ; use another --out"
        )
    return state, Position(**json.loads(position))


def newest_step(folder: RunFolder) -> int:
    """Return the step that a run under `folder` would resume from."""
    found = checkpoints(folder)
    return int(found[-1].removeprefix(PREFIX)) if found else 0


def claim(folder: RunFolder) -> str:
    """Take a folder for a new run, from one whose driver died, say, and whose workers live on for a moment; returns the
    token that `check_owner` asks for."""
    token = secrets.token_hex(8)
    folder.write(OWNER, token.encode())
    return token


def check_owner(folder: RunFolder, token: str) -> None:
    """Raises TrainingError where another run has claimed the folder since."""
    if token and folder.read(OWNER) != token.encode():
        raise TrainingError(f"another run works in {folder.uri} now: this one stops")


def checkpoints(folder: RunFolder) -> list[str]:
    """Complete checkpoints, oldest first."""
    names = [name for name in folder.names() if name.startswith(PREFIX)]
    return [name for name in names if "position.json" in folder.names(name)]
