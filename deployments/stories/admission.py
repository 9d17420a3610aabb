"""Which requests are taken on: one place for all fronts, by the time that they would wait.

Work is predicted when a request comes and counted down as it is done: tokens for the generator, for the decoder UNet
samples and what finishing a picture is worth in them. Engines share their time equally among clients, so what a request
waits for is, of each other client's work, at most as much as its own client has: somebody who sends many stories at
once waits for them himself.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Literal

from minigpt5.types import (
    DrawSettings,
    Picture,
    PictureFailed,
    Progress,
    SlotOpened,
    StoryEvent,
    StoryRequest,
    TextDelta,
    Usage,
    Vokens,
)

Engine = Literal["generator", "decoder"]
ENGINES: tuple[Engine, ...] = ("generator", "decoder")
FIRST_SPEEDS: dict[Engine, float] = {"generator": 40.0, "decoder": 40.0}
"""Tokens and UNet samples a second, until it is known how fast the engines are."""
SPEED_WINDOW_S = 2.0
"""A speed is known after so much time in which there was work."""
SPEED_MEMORY_S = 60.0
"""After so much of it, what was measured counts by half: stories that started together end their pages together, and
over less than several pages a speed would swing with them."""
SPEED_AGE_S = 120.0
"""A speed that was measured longer ago counts only where none is newer: it may be that of a stall, after which nobody
was admitted to measure it again."""
STALL = 10.0
"""Work that takes so many times as long as it should has waited for something else than the engine."""
SPEED_UP = 1.35
"""How much more an engine does when twice as many share its steps, until that is measured: for 16 default stories at
once the storybook model's engines do 3.4 times as much as for one on two cores, which is 1.35 for each doubling."""
CHARACTERS_PER_TOKEN = 4
FINISH_SAMPLES = 4.0
"""What the second decoder and the PNG of a picture cost, in UNet samples: 3 to 4 of the storybook model's, by how many
are drawn at once, and half of that where the VAE itself paints. Little beside forty, half of a picture of four."""
MAX_RETRY_AFTER_S = 600
ARRIVALS_S = 60.0
"""What has come in so much time is taken to come in the next, too."""
LATE_REQUESTS = 40
"""Requests that were done last, of which one in ten may have taken longer than what new ones are refused by."""
MAX_LATENESS = 3.0
NO_WORK = 1e-6
"""Sums of costs that were added and taken away end near zero, not at it."""


class Overloaded(Exception):
    """A request would wait for too long; ask again after `retry_after_s`."""

    def __init__(self, message: str, *, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, kw_only=True)
class Load:
    """What one front, or several, have promised."""

    num_running: int = 0
    work: dict[Engine, dict[str, float]] = field(default_factory=dict)
    """By engine and client, in tokens and UNet samples; with what is expected to come in the place of work done."""
    per_s: dict[Engine, float] = field(default_factory=dict)
    """How much an engine does for them, where there is work."""

    @classmethod
    def total(cls, loads: Iterable[Load]) -> Load:
        loads = list(loads)
        work: dict[Engine, dict[str, float]] = {engine: {} for engine in ENGINES}
        for load in loads:
            for engine, clients in load.work.items():
                for client, cost in clients.items():
                    work[engine][client] = work[engine].get(client, 0.0) + cost
        return cls(
            num_running=sum(load.num_running for load in loads),
            work=work,
            per_s={engine: sum(load.per_s.get(engine, 0.0) for load in loads) for engine in ENGINES},
        )


class Admission:
    """The work that has been promised, by engine and client."""

    def __init__(
        self,
        *,
        max_wait_s: float,
        max_running: int,
        relative_pixels: Callable[[DrawSettings], float] = lambda draw: 1.0,
        guides_in_one_call: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """A request is refused where it would be done in more than `max_wait_s`, unless it would be on an idle server
        too; and beyond `max_running`, which bounds memory. `relative_pixels`, `guides_in_one_call`: see ModelConfig."""
        self.max_wait_s, self.max_running = max_wait_s, max_running
        self.relative_pixels, self.guides_in_one_call = relative_pixels, guides_in_one_call
        self.num_running = 0
        self.others = Load()
        """Load of the other fronts, as they last reported it."""
        self._work: dict[Engine, defaultdict[str, float]] = {engine: defaultdict(float) for engine in ENGINES}
        self._done: dict[Engine, defaultdict[str, float]] = {engine: defaultdict(float) for engine in ENGINES}
        """Done of the requests that run."""
        self._at_work: dict[Engine, set[Reservation]] = {engine: set() for engine in ENGINES}
        """Requests that an engine has something to do for now, as the decoder has once there are vokens."""
        self._speeds = {engine: _Speed(FIRST_SPEEDS[engine], clock) for engine in ENGINES}
        self._clock = clock
        self._arrivals: deque[tuple[float, dict[Engine, float]]] = deque()
        """When what work was accepted, of the last minute."""
        self._lateness: deque[float] = deque(maxlen=LATE_REQUESTS)
        """How many times as long as predicted the last requests took."""

    @property
    def is_full(self) -> bool:
        """Nothing more is taken, however little it asks for."""
        return self._num_at_all >= self.max_running

    @property
    def _num_at_all(self) -> int:
        """Requests that run at all fronts."""
        return self.num_running + self.others.num_running

    @property
    def load(self) -> Load:
        """Load of this front."""
        band = _band(self._num_at_all)
        busy = {engine: speed.per_s(band) for engine, speed in self._speeds.items() if self._work[engine]}
        work = {engine: self._with_arrivals(engine) for engine in ENGINES}
        return Load(num_running=self.num_running, work=work, per_s=busy)

    @property
    def retry_after_s(self) -> int:
        """A place should be free by then: the mean work of those who have one."""
        num = max(1, self._num_at_all)
        work_s = max(sum(self._clients(engine).values()) / self._per_s(engine, num) for engine in ENGINES)
        return _whole(work_s / num)

    def wait_s(self, request: StoryRequest, *, num_pictures: int = 1) -> float:
        """Seconds until `request` would be done."""
        costs = self.predict(request, num_pictures=num_pictures)
        return max(self._wait_s(engine, request.key, costs[engine]) for engine in ENGINES)

    def predict(self, request: StoryRequest, *, num_pictures: int) -> dict[Engine, float]:
        """What `request` may cost with this model."""
        return predict(
            request,
            num_pictures=num_pictures,
            relative_pixels=self.relative_pixels(request.draw),
            guides_in_one_call=self.guides_in_one_call,
        )

    def reserve(self, request: StoryRequest, *, num_pictures: int = 1) -> Reservation:
        """Take a place, which the caller must release; `num_pictures` are drawn of each page. Raises Overloaded."""
        if self.is_full:
            raise Overloaded(
                f"{self._num_at_all} requests are running and the limit is {self.max_running}: try again in "
                f"{self.retry_after_s} s",
                retry_after_s=self.retry_after_s,
            )
        predicted_s = self.wait_s(request, num_pictures=num_pictures)
        wait_s = predicted_s * self.lateness
        if self._num_at_all and wait_s > self.max_wait_s:
            too_long_s = _whole(wait_s - self.max_wait_s)
            raise Overloaded(
                f"this request may take {wait_s:.0f} s and the limit is {self.max_wait_s:g} s: "
                f"try again in {too_long_s} s, or ask for fewer pages or steps",
                retry_after_s=too_long_s,
            )
        self._change_running(1)
        return Reservation(self, request, num_pictures=num_pictures, predicted_s=predicted_s)

    @property
    def lateness(self) -> float:
        """How many times as long as predicted a request may take: nine in ten of the last ones took less, or 1."""
        late = sorted(self._lateness)
        return min(MAX_LATENESS, max(1.0, late[len(late) * 9 // 10])) if late else 1.0

    def _wait_s(self, engine: Engine, key: str, cost: float) -> float:
        work = self._clients(engine)
        own = work.get(key, 0.0) + cost
        before = sum(min(other, own) for name, other in work.items() if name != key)
        return (own + before) / self._per_s(engine, self._num_at_all + 1)

    def _clients(self, engine: Engine) -> dict[str, float]:
        """Work of each client, at all fronts."""
        return Load.total([self.load, self.others]).work[engine]

    def _per_s(self, engine: Engine, num: int) -> float:
        """Speed with `num` requests at once, which share the engines' steps. A front only sees what an engine does for
        itself: without work of its own it takes the others' speed as the whole."""
        others = self.others.per_s.get(engine, 0.0)
        if others and not self._work[engine]:
            return others
        return self._speeds[engine].per_s(_band(num)) + others

    def _with_arrivals(self, engine: Engine) -> dict[str, float]:
        """Work of each client, and as much more as will come in the place of what is done: requests that run share the
        engines with later ones. Where requests keep an engine busy, others never have less than all of their work."""
        while self._arrivals and self._arrivals[0][0] < self._clock() - ARRIVALS_S:
            self._arrivals.popleft()
        came = sum(costs[engine] for _, costs in self._arrivals) / ARRIVALS_S
        is_known = self._arrivals and self._clock() - self._arrivals[0][0] > SPEED_WINDOW_S
        share = min(1.0, came / self._per_s(engine, max(1, self._num_at_all))) if is_known else 0.0
        return {key: left + share * self._done[engine].get(key, 0.0) for key, left in self._work[engine].items()}

    def _change_running(self, change: int) -> None:
        for speed in self._speeds.values():
            speed.count_time(_band(self._num_at_all))
        self.num_running += change

    def _promise(self, engine: Engine, key: str, cost: float) -> None:
        if cost:
            self._work[engine][key] += cost

    def _settle(self, engine: Engine, key: str, cost: float, *, is_done: bool) -> None:
        """Work is done, or will never be."""
        if is_done:
            self._done[engine][key] += cost
            self._speeds[engine].add(cost, _band(self._num_at_all))
        self._work[engine][key] -= cost
        if self._work[engine][key] <= NO_WORK:
            del self._work[engine][key]

    def _begin(self, engine: Engine, reservation: Reservation) -> None:
        self._at_work[engine].add(reservation)
        self._speeds[engine].wake()

    def _pause(self, engine: Engine, reservation: Reservation) -> None:
        self._at_work[engine].discard(reservation)
        if not self._at_work[engine]:
            self._speeds[engine].rest()

    def _forget(self, engine: Engine, key: str, done: float) -> None:
        """A request that has done so much runs no longer."""
        self._done[engine][key] -= done
        if self._done[engine][key] <= NO_WORK:
            del self._done[engine][key]


_OF_PAGE = (TextDelta, SlotOpened, Vokens, Progress, Picture, PictureFailed)
"""Events of the work for one page."""


class Reservation:
    """A request that was taken on. As a context manager it is left in the end."""

    def __init__(self, admission: Admission, request: StoryRequest, *, num_pictures: int, predicted_s: float) -> None:
        self._admission, self._key = admission, request.key
        self._predicted_s, self._began_at = predicted_s, admission._clock()
        self._relative_pixels = admission.relative_pixels(request.draw)
        self._promised = admission.predict(request, num_pictures=num_pictures)
        self._left = dict(self._promised)
        admission._arrivals.append((admission._clock(), self._promised))
        self._num_unread = _prompt_tokens(request)
        """Tokens of the prompt, until a text shows that it was read."""
        self._page_tokens = (self._left["generator"] - self._num_unread) / request.pages
        self._num_written = 0.0
        """Tokens of the page that is being written."""
        self._num_pictures, self._num_owed = num_pictures, 0
        """Pictures of a page, and how many of those whose vokens are there are not drawn yet."""
        self._samples = self._relative_pixels * samples_per_step(
            request.draw, guides_in_one_call=admission.guides_in_one_call
        )
        self._has_reference = request.consistency == "story"
        self._known = {page.index for page in request.previous}
        """Pages that cost nothing: they are there."""
        self._steps: dict[tuple[int, int], int] = {}
        """Steps done, by page and picture of it: not every one is told of."""
        self._is_left = False
        for engine, cost in self._left.items():
            admission._promise(engine, self._key, cost)
        admission._begin("generator", self)

    def observe(self, event: StoryEvent | Vokens, *, picture: int = 0) -> None:
        """Count down what an event shows to be done. `picture`: which one of its page, where several are drawn at
        once."""
        if self._is_left or (isinstance(event, _OF_PAGE) and event.page in self._known):
            return
        match event:
            case TextDelta(text=text):
                self._write(len(text) / CHARACTERS_PER_TOKEN)
            case SlotOpened() | Vokens():
                self._write(max(0.0, self._page_tokens - self._num_written))
                self._num_written = 0.0
                self._num_owed += self._num_pictures
                self._admission._begin("decoder", self)
            case Usage(prompt_tokens=num_read, completion_tokens=num_written):
                num_counted = self._promised["generator"] - self._left["generator"]
                self._take("generator", num_read + num_written - num_counted)
                self._admission._pause("generator", self)  # a reply may have promised more
            case Progress(page=page, step=step):
                self._admission._begin("decoder", self)
                samples = self._samples * (1 + (self._has_reference and page > 1))
                self._take("decoder", samples * max(0, step - self._steps.get((page, picture), 0)))
                self._steps[page, picture] = step
            case Picture(page=page):
                self._take("decoder", FINISH_SAMPLES * self._relative_pixels)
                self._steps.pop((page, picture), None)  # another picture of the page begins at its first step
                self._end_picture()
            case PictureFailed():
                self._end_picture()

    def _write(self, num_tokens: float) -> None:
        self._take("generator", self._num_unread + num_tokens)
        self._num_unread = 0.0
        self._num_written += num_tokens

    def _end_picture(self) -> None:
        self._num_owed = max(0, self._num_owed - 1)
        if not self._num_owed:
            self._admission._pause("decoder", self)

    def release(self) -> None:
        """Give the place back; a second time does nothing."""
        if not self._is_left:
            self._is_left = True
            if all(cost <= NO_WORK for cost in self._left.values()):
                took_s = self._admission._clock() - self._began_at
                self._admission._lateness.append(took_s / self._predicted_s)
            for engine, cost in self._left.items():
                self._admission._pause(engine, self)
                self._admission._settle(engine, self._key, cost, is_done=False)
                self._admission._forget(engine, self._key, self._promised[engine] - cost)
            self._admission._change_running(-1)

    def _take(self, engine: Engine, cost: float) -> None:
        cost = min(cost, self._left[engine])
        if cost > 0:
            self._left[engine] -= cost
            self._admission._settle(engine, self._key, cost, is_done=True)
        if self._left[engine] <= NO_WORK:
            self._admission._pause(engine, self)

    def __enter__(self) -> Reservation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def predict(
    request: StoryRequest,
    *,
    num_pictures: int = 1,
    relative_pixels: float = 1.0,
    guides_in_one_call: bool = False,
) -> dict[Engine, float]:
    """The most that a request may cost after its previous pages: tokens, and UNet samples of the model's own size."""
    num_texts = {"story": request.pages, "reply": 1, "caption": 0, "scene": 1}[request.mode]
    num_drawn = 0 if request.pictures == "none" else request.pages * num_pictures
    samples = request.draw.steps * samples_per_step(request.draw, guides_in_one_call=guides_in_one_call)
    num_firsts = 0 if request.previous else num_pictures
    num_references = max(0, num_drawn - num_firsts) if request.consistency == "story" else 0
    return {
        "generator": _prompt_tokens(request) + num_texts * request.sampling.max_page_tokens + 1.0,
        "decoder": relative_pixels * (num_drawn * (samples + FINISH_SAMPLES) + num_references * samples),
    }


def _prompt_tokens(request: StoryRequest) -> float:
    """About as many as its texts have."""
    return sum(len(part) for part in request.prompt if isinstance(part, str)) / CHARACTERS_PER_TOKEN


def _whole(seconds: float) -> int:
    return min(MAX_RETRY_AFTER_S, max(1, math.ceil(seconds)))


def samples_per_step(draw: DrawSettings, *, guides_in_one_call: bool) -> int:
    """Guidance needs a second one, unless the denoiser takes its scale as an input."""
    return 1 if guides_in_one_call or draw.guidance_scale <= 1 else 2


def _band(num: int) -> int:
    """Numbers of requests at once for which an engine has about one speed: 1, 2, 3 to 4, 5 to 8, ..."""
    return max(0, num - 1).bit_length()


class _Speed:
    """How much an engine does in a second while it has work, by the band of requests at once: a step that sixteen
    share does several times the work of one's own."""

    def __init__(self, first: float, clock: Callable[[], float]) -> None:
        self._first, self._clock = first, clock
        self._done: defaultdict[int, float] = defaultdict(float)
        self._busy_s: defaultdict[int, float] = defaultdict(float)
        self._known: dict[int, tuple[float, float]] = {}
        """Speed, and when it was measured."""
        self._new_s: defaultdict[int, float] = defaultdict(float)
        """Time since work was done last."""
        self._shares: dict[int, float] = {}
        """Of the bands in the time of the last work."""
        self._since: float | None = None
        """When the time began that is not counted yet; None: there is no work."""
        self._has_worked = False

    def per_s(self, band: int) -> float:
        """As measured in this band; else from the nearest one that is known, the lower of two, and SPEED_UP."""
        newest = {other: speed for other, (speed, _) in self._known.items() if not self._is_old(other)}
        known = newest or {other: speed for other, (speed, _) in self._known.items()}
        if not known:
            return self._first
        nearest = min(known, key=lambda other: (abs(other - band), other))
        return known[nearest] * SPEED_UP ** (band - nearest)

    def _is_old(self, band: int) -> bool:
        return self._clock() - self._known[band][1] > SPEED_AGE_S

    def _is_stall(self, done: float, band: int) -> bool:
        """Whether this work came much later than the engine's speed explains. The first work of all comes late where
        the engine was starting."""
        waited_s = sum(self._new_s.values())
        if not self._known:
            return not self._has_worked and waited_s > max(SPEED_WINDOW_S, STALL * done / self._first)
        return waited_s > max(SPEED_AGE_S, STALL * done / self.per_s(band))

    def wake(self) -> None:
        if self._since is None:
            self._since = self._clock()

    def rest(self) -> None:
        """There is nothing to do. Time that brought no work is not counted."""
        self._since = None
        self._new_s.clear()

    def count_time(self, band: int) -> None:
        """The time so far had so many requests."""
        if self._since is not None:
            now = self._clock()
            self._new_s[band] += now - self._since
            self._since = now

    def add(self, done: float, band: int) -> None:
        """Work was done, evenly in the time since the last: what is told of in lumps makes no band a slow one. The time
        of a stall does not count: a minute of it would take hours to be outweighed."""
        self.count_time(band)
        if self._is_stall(done, band):
            self._new_s.clear()
        self._has_worked = True
        if new_s := sum(self._new_s.values()):
            self._shares = {other: seconds / new_s for other, seconds in self._new_s.items()}
        for other, share in (self._shares or {band: 1.0}).items():
            self._done[other] += done * share
            self._busy_s[other] += self._new_s[other]
            if self._busy_s[other] >= SPEED_WINDOW_S:
                self._known[other] = self._done[other] / self._busy_s[other], self._clock()
            if self._busy_s[other] >= SPEED_MEMORY_S:
                self._done[other] /= 2
                self._busy_s[other] /= 2
        self._new_s.clear()
