"""What the two stages of a page take on one replica. `deployments.profile` measures it, `deployments.plan` reads it."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path

from minigpt5.errors import SettingsError


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A replica's text of a page, or its picture. Up to `batch` share its steps; more wait for a place."""

    alone_s: float
    """Seconds of one item that has the replica to itself."""
    full_s: float
    """Seconds of each item of a full batch."""
    batch: int
    cv: float = 0.0
    """Coefficient of variation: standard deviation of the seconds of alike items, over their mean."""

    def __post_init__(self) -> None:
        if not (self.alone_s > 0 and self.full_s > 0 and self.batch >= 1 and self.cv >= 0):
            raise SettingsError(f"{self} is no stage: measure it with `python -m deployments.profile`")

    def latency_s(self, num: float) -> float:
        """Seconds of each of `num` items at once: a power of their number between the two that were measured."""
        return float(self.alone_s * max(1.0, min(num, self.batch)) ** self._exponent)

    @property
    def item_s(self) -> float:
        """Seconds of the replica for one item, in a full batch."""
        return self.full_s / self.batch

    @property
    def speed_up(self) -> float:
        """How much more a replica does in a second when twice as many share its steps."""
        return float(2 ** (1 - self._exponent))

    @property
    def _exponent(self) -> float:
        return math.log(self.full_s / self.alone_s) / math.log(self.batch) if self.batch > 1 else 0.0


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Both stages of a model on some hardware."""

    text: Stage
    picture: Stage

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, path: Path) -> Profile:
        """Raises SettingsError where the file is no profile."""
        try:
            stages = json.loads(path.read_text())
            return cls(text=Stage(**stages["text"]), picture=Stage(**stages["picture"]))
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise SettingsError(
                f"{path} is no profile ({error}): make it with `python -m deployments.profile URL`"
            ) from error
