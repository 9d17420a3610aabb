"""Admission by predicted work: who is refused, and that every place is given back."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from typing import Literal

import pytest

from deployments.stories.admission import (
    ENGINES,
    FINISH_SAMPLES,
    FIRST_SPEEDS,
    SPEED_UP,
    Admission,
    Overloaded,
    Reservation,
    _Speed,
    predict,
)
from minigpt5.types import (
    DrawSettings,
    Page,
    Picture,
    PictureFailed,
    Progress,
    Sampling,
    SlotOpened,
    StoryRequest,
    TextDelta,
    Usage,
    Vokens,
)
from tests.helpers.fakes import FakeGenerator

PICTURE_SAMPLES = 20 * 2 + FINISH_SAMPLES
STORY_S = 4 * PICTURE_SAMPLES / FIRST_SPEEDS["decoder"]
"""Predicted seconds of `story()` on an idle server: its pictures take longer than its text."""


def story(key: str = "a", *, pages: int = 4, guidance_scale: float = 3.0) -> StoryRequest:
    return StoryRequest(
        prompt=("A fox",),
        pages=pages,
        key=key,
        sampling=Sampling(max_page_tokens=16),
        draw=DrawSettings(steps=20, guidance_scale=guidance_scale),
    )


PICTURE = Picture(page=1, png=b"", width=128, height=128, seed=1, denoise_steps=20)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def make(max_wait_s: float = 60.0, *, max_running: int = 100, clock: Clock | None = None) -> Admission:
    return Admission(max_wait_s=max_wait_s, max_running=max_running, clock=clock or Clock())


def test_work_is_predicted_from_pages_steps_and_guidance() -> None:
    assert predict(story())["decoder"] == 4 * PICTURE_SAMPLES
    assert predict(story(guidance_scale=1.0))["decoder"] == 4 * (20 + FINISH_SAMPLES)
    assert predict(story(guidance_scale=0.5)) == predict(story(guidance_scale=1.0)), "at most 1 is no guidance"
    assert predict(story(), num_pictures=3)["decoder"] == 3 * 4 * PICTURE_SAMPLES
    assert predict(story())["generator"] >= 4 * 16
    assert make().wait_s(story()) == pytest.approx(STORY_S)


def test_pages_that_are_there_cost_nothing_and_their_events_are_no_work() -> None:
    left = dataclasses.replace(story(pages=1), previous=(Page(index=1, text=""), Page(index=2, text="")))
    assert predict(left) == predict(story(pages=1))
    admission = make()
    with admission.reserve(left) as reservation:
        before = admission.load.work
        for page in (1, 2):
            reservation.observe(SlotOpened(page=page))
            reservation.observe(dataclasses.replace(PICTURE, page=page))
        assert admission.load.work == before
        reservation.observe(SlotOpened(page=3))
        assert admission.load.work != before


def test_a_denoiser_that_takes_the_guidance_scale_makes_one_prediction_a_step() -> None:
    unguided = predict(story(guidance_scale=1.0))["decoder"]
    assert predict(story(), guides_in_one_call=True)["decoder"] == unguided
    admission = Admission(max_wait_s=60.0, max_running=100, guides_in_one_call=True, clock=Clock())
    idle_s = admission.wait_s(story())
    assert idle_s == pytest.approx(unguided / FIRST_SPEEDS["decoder"])
    with admission.reserve(story()) as reservation:
        for page in range(1, 5):
            reservation.observe(SlotOpened(page=page))
            reservation.observe(Progress(page=page, step=20, steps=20))
            reservation.observe(dataclasses.replace(PICTURE, page=page))
        assert admission.wait_s(story("b")) == pytest.approx(idle_s), "all that was promised of the decoder is done"


def test_what_would_wait_for_too_long_is_refused_with_the_time_to_come_back() -> None:
    admission = make(3.5 * STORY_S)
    for _ in range(3):
        admission.reserve(story())
    with pytest.raises(Overloaded, match="may take") as refused:
        admission.reserve(story())
    assert refused.value.retry_after_s == pytest.approx(0.5 * STORY_S, abs=1)
    admission.reserve(story(pages=1))  # a smaller one still fits


def test_requests_that_take_longer_than_predicted_have_new_ones_refused_earlier() -> None:
    def finish(times: float) -> None:
        predicted_s = admission.wait_s(story())
        with admission.reserve(story()) as reservation:
            clock.now += times * predicted_s
            for page in range(1, 5):
                reservation.observe(SlotOpened(page=page))
                reservation.observe(Progress(page=page, step=20, steps=20))
                reservation.observe(dataclasses.replace(PICTURE, page=page))

    clock = Clock()
    admission = make(clock=clock)
    for times in [0.5] * 8 + [1.8] * 2:
        finish(times)
    assert admission.lateness == pytest.approx(1.8)
    admission.max_wait_s = 2.2 * admission.wait_s(story())
    with admission.reserve(story()), pytest.raises(Overloaded, match="this request may take"):
        admission.reserve(story())  # two would take twice as long as one, and 1.8 times as long as that
    for _ in range(40):
        finish(0.5)
    assert admission.lateness == 1.0


def test_who_sends_many_stories_waits_for_them_himself() -> None:
    admission = make(20 * STORY_S)
    for _ in range(16):
        admission.reserve(story("many"))
    assert admission.wait_s(story("few", pages=1)) == pytest.approx(2 * STORY_S / 4)
    assert admission.wait_s(story("many")) == pytest.approx(17 * STORY_S)


def test_an_idle_server_takes_what_takes_longer_than_the_limit() -> None:
    admission = make(STORY_S / 10)
    reservation = admission.reserve(story())
    with pytest.raises(Overloaded):
        admission.reserve(story())
    reservation.release()
    admission.reserve(story())


def test_done_work_is_counted_down_and_nothing_is_left_behind() -> None:
    admission = make()
    with admission.reserve(story()) as reservation:
        reservation.observe(SlotOpened(page=1))
        for step in range(1, 21):
            reservation.observe(Progress(page=1, step=step, steps=20))
        reservation.observe(PICTURE)
        assert admission.wait_s(story("b")) == pytest.approx((1 + 0.75) * STORY_S)
        for step in range(200):  # more than was promised
            reservation.observe(Progress(page=2, step=step, steps=200))
        assert admission.wait_s(story("b")) == pytest.approx(STORY_S)
    reservation.release()
    assert admission.num_running == 0
    assert admission.wait_s(story()) == pytest.approx(STORY_S)


def test_a_caption_needs_no_text() -> None:
    caption = StoryRequest(prompt=("A fox",), pages=1, mode="caption", draw=DrawSettings(steps=20))
    admission = make()
    with admission.reserve(caption) as reservation:
        reservation.observe(FakeGenerator()._vokens(1))
    assert isinstance(FakeGenerator()._vokens(1), Vokens)
    assert admission.num_running == 0


def test_it_learns_how_fast_the_engines_are() -> None:
    clock = Clock()
    admission = make(clock=clock)
    reservation = admission.reserve(story(pages=16))
    for step in range(200):
        clock.now += 2 / (10 * FIRST_SPEEDS["decoder"])  # ten times as fast as was thought
        reservation.observe(Progress(page=1 + step // 20, step=step % 20 + 1, steps=20))
    reservation.release()
    before = admission.wait_s(story())
    for _ in range(20):
        with admission.reserve(story(pages=16)) as reservation:
            for step in range(320):
                clock.now += 2 / (10 * FIRST_SPEEDS["decoder"])
                reservation.observe(Progress(page=1 + step // 20, step=step % 20 + 1, steps=20))
    assert admission.wait_s(story()) < before
    clock.now += 1000.0  # time without work says nothing
    with admission.reserve(story()) as reservation:
        reservation.observe(Progress(page=1, step=1, steps=20))
    assert admission.wait_s(story()) < before


def test_places_are_bounded_whatever_is_asked_for() -> None:
    admission = make(1e9, max_running=2)
    admission.reserve(story(pages=1))
    reservation = admission.reserve(story(pages=1))
    assert admission.is_full
    with pytest.raises(Overloaded, match="the limit is 2") as refused:
        admission.reserve(story(pages=1))
    assert 1 <= refused.value.retry_after_s <= 600
    reservation.release()
    assert not admission.is_full


def test_speed_is_known_by_the_number_of_requests_at_once() -> None:
    clock = Clock()
    speed = _Speed(100.0, clock)
    speed.wake()
    clock.now = 6.0
    speed.add(60.0, 0)
    assert speed.per_s(0) == pytest.approx(10.0), "a measurement replaces the first guess"
    assert speed.per_s(4) == pytest.approx(10.0 * SPEED_UP**4), "from the nearest that is known"
    clock.now = 12.0
    speed.add(240.0, 4)
    assert (speed.per_s(0), speed.per_s(4)) == (pytest.approx(10.0), pytest.approx(40.0))
    assert speed.per_s(2) == pytest.approx(10.0 * SPEED_UP**2), "of two that are as near, from the lower"
    speed.rest()
    clock.now = 1000.0  # time without work says nothing
    speed.wake()
    assert speed.per_s(4) == pytest.approx(40.0)


@pytest.mark.parametrize(("start_s", "is_slow"), [(60.0, False), (0.5, True)])
def test_the_start_of_an_engine_is_not_its_speed(start_s: float, is_slow: bool) -> None:
    clock = Clock()
    speed = _Speed(40.0, clock)
    speed.wake()
    clock.now = start_s
    pace_s = 10.0 if is_slow else 0.5
    for _ in range(20):
        speed.add(10.0, 0)
        clock.now += pace_s
    assert speed.per_s(0) == pytest.approx(10.0 / pace_s, rel=0.2)


class Told:
    """A story of the default request in a simulated server: each page's text, then its picture beside the next text."""

    TOKENS, SAMPLES = 48.0, 6.0
    """Of a page and its picture, as this server writes and draws: a page may have more tokens and has fewer."""

    def __init__(self, admission: Admission, clock: Clock) -> None:
        self.request = StoryRequest(
            prompt=("A fox",),
            pages=4,
            sampling=Sampling(max_page_tokens=96),
            draw=DrawSettings(steps=4, guidance_scale=1),
        )
        self.began, self.ended = clock.now, 0.0
        self.predicted_s = admission.wait_s(self.request)
        self.reservation: Reservation = admission.reserve(self.request)
        self.text_left = [self.TOKENS] * 4
        self.picture_left = [self.SAMPLES] * 4

    @property
    def writes(self) -> int | None:
        return next((page for page, left in enumerate(self.text_left) if left > 0), None)

    @property
    def draws(self) -> int | None:
        written = (page for page, left in enumerate(self.text_left) if left <= 0)
        return next((page for page in written if self.picture_left[page] > 0), None)

    def write(self, tokens: float) -> None:
        page = self.writes
        assert page is not None
        self.text_left[page] -= tokens
        if self.text_left[page] <= 0:
            self.reservation.observe(SlotOpened(page=page + 1))

    def draw(self, samples: float) -> None:
        page = self.draws
        assert page is not None
        self.picture_left[page] -= samples
        if self.picture_left[page] <= 0:
            self.reservation.observe(Progress(page=page + 1, step=4, steps=4))
            self.reservation.observe(dataclasses.replace(PICTURE, page=page + 1))


def simulate(arrivals: list[float], admission: Admission, clock: Clock) -> Iterator[Told]:
    """Stories that come at these times, on a machine whose steps do more the more stories share them. In turn as they
    end."""
    tick_s, running = 0.02, []
    while arrivals or running:
        clock.now += tick_s
        while arrivals and arrivals[0] <= clock.now:
            arrivals.pop(0)
            running.append(Told(admission, clock))
        writing = [told for told in running if told.writes is not None]
        drawing = [told for told in running if told.draws is not None]
        for told in writing:
            told.write(tick_s * 20.0 * len(writing) ** 0.6 / len(writing))
        for told in drawing:
            told.draw(tick_s * 40.0 * len(drawing) ** 0.3 / len(drawing))
        for told in [told for told in running if told.writes is None and told.draws is None]:
            running.remove(told)
            told.reservation.release()
            told.ended = clock.now
            yield told


@pytest.mark.parametrize("num", [1, 4, 16])
def test_stories_end_when_it_was_predicted_however_many_there_are(num: int) -> None:
    clock = Clock()
    admission = make(1e9, clock=clock)
    for size in (1, 1, 16, 4, 1, 16, 4):  # learns
        list(simulate([clock.now] * size, admission, clock))
    told = list(simulate([clock.now] * num, admission, clock))
    last = max(told, key=lambda one: one.predicted_s)
    assert last.predicted_s == pytest.approx(last.ended - last.began, rel=0.3)


def test_stories_that_keep_coming_end_when_it_was_predicted() -> None:
    clock, chance = Clock(), random.Random(0)
    admission = make(1e9, clock=clock)
    came, arrivals = 0.0, []
    for _ in range(80):
        came += chance.expovariate(0.35)
        arrivals.append(came)
    ratios = sorted(
        told.predicted_s / (told.ended - told.began) for told in list(simulate(arrivals, admission, clock))[20:]
    )
    assert 0.8 <= ratios[len(ratios) // 2] <= 1.2
    assert sum(0.7 <= ratio <= 1.3 for ratio in ratios) >= 0.85 * len(ratios)


def test_after_a_stall_others_are_admitted_again() -> None:
    clock = Clock()
    admission = make(300.0, clock=clock)

    def tell(stories: list[Reservation], *, stall_s: float = 0.0) -> None:
        for page in range(1, 5):
            for reservation in stories:
                reservation.observe(SlotOpened(page=page))
                clock.now += 5.0 + (stall_s if page == 4 else 0.0)
                reservation.observe(Progress(page=page, step=20, steps=20))
                reservation.observe(dataclasses.replace(PICTURE, page=page))
        for reservation in stories:
            reservation.release()

    tell([admission.reserve(story()), admission.reserve(story("b"))])
    before_s = admission.wait_s(story("c"))
    tell([admission.reserve(story()), admission.reserve(story("b"))], stall_s=3000.0)
    assert admission.wait_s(story("c")) == pytest.approx(before_s, rel=0.5)
    tell([admission.reserve(story())])
    first = admission.reserve(story())
    admission.reserve(story("b")).release()
    first.release()


def test_a_speed_of_a_stall_is_forgotten_where_a_newer_one_is_known() -> None:
    clock = Clock()
    speed = _Speed(40.0, clock)
    speed.wake()
    clock.now += 0.5
    speed.add(0.1, 1)
    clock.now += 1000.0
    speed.add(9.9, 1)
    assert speed.per_s(1) == pytest.approx(0.01, rel=1e-3)
    for _ in range(40):
        clock.now += 5.0
        speed.add(100.0, 0)
    assert speed.per_s(1) == pytest.approx(20.0 * SPEED_UP)


@pytest.mark.parametrize("pictures", ["none", "auto"])
def test_replies_of_text_alone_leave_the_speeds_as_they_are(pictures: Literal["none", "auto"]) -> None:
    clock = Clock()
    admission = make(120.0, clock=clock)
    reply = StoryRequest(
        prompt=("What is a fox?",), pages=1, mode="reply", pictures=pictures, sampling=Sampling(max_page_tokens=64)
    )

    def write(*replies: Reservation) -> None:
        """A second's text of them all, as fast as the simulated server writes."""
        for _ in range(4):
            clock.now += 0.25
            for one in replies:
                one.observe(TextDelta(page=1, text="a" * (20 if len(replies) == 1 else 15)))

    def speeds() -> list[float]:
        return [admission._per_s(engine, num) for engine in ENGINES for num in (1, 2)]

    list(simulate([clock.now, clock.now], admission, clock))
    before = speeds()
    first = admission.reserve(reply)
    for _ in range(900):
        second = admission.reserve(reply)
        write(first, second)
        first.observe(Usage(prompt_tokens=4, completion_tokens=50))
        first.release()
        write(second)
        first = second
    first.release()
    list(simulate([clock.now, clock.now], admission, clock))
    # A story promises twice the tokens that it has here, and a reply is counted by those that it has.
    assert all(now > 0.4 * then for now, then in zip(speeds(), before, strict=True)), (speeds(), before)
    with admission.reserve(story("a")):
        admission.reserve(story("b")).release()


def test_what_a_reply_wrote_is_work_and_what_it_might_have_written_is_none() -> None:
    clock = Clock()
    admission = make(clock=clock)
    request = dataclasses.replace(story(pages=1), mode="reply", sampling=Sampling(max_page_tokens=4000))
    for _ in range(4):
        with admission.reserve(request) as reservation:
            clock.now += 2.0
            reservation.observe(TextDelta(page=1, text="a" * 40))
            reservation.observe(Usage(prompt_tokens=1, completion_tokens=19))
            clock.now += 100.0  # the picture of a page that is not told of here
    assert admission._per_s("generator", 1) == pytest.approx(10.0, rel=0.1)


def test_the_decoder_is_measured_while_it_has_a_picture_to_draw() -> None:
    clock = Clock()
    admission = make(clock=clock)
    with admission.reserve(story()) as reservation:
        for page in range(1, 5):
            clock.now += 50.0  # its text
            reservation.observe(SlotOpened(page=page))
            if page == 2:
                reservation.observe(PictureFailed(page=page, error="no memory"))
                continue
            for step in range(1, 21):
                clock.now += 0.25
                reservation.observe(Progress(page=page, step=step, steps=20))
            reservation.observe(dataclasses.replace(PICTURE, page=page))
    assert admission._per_s("decoder", 1) == pytest.approx(8.0, rel=0.15)
    assert not any(admission._at_work.values())


def test_nothing_is_left_of_requests_of_one_key_whatever_their_sizes() -> None:
    rng = random.Random(5)
    for _ in range(300):
        admission = make(1e9)
        requests = [story(pages=rng.randint(1, 8)) for _ in range(3)]
        running = [(admission.reserve(request), request) for request in requests]
        for reservation, request in running:
            for page in range(1, request.pages + 1):
                reservation.observe(SlotOpened(page=page))
                reservation.observe(Progress(page=page, step=rng.randint(1, 20), steps=20))
                reservation.observe(dataclasses.replace(PICTURE, page=page))
            reservation.release()
        assert not any(admission.load.work.values()) and not any(map(len, admission._done.values()))


def test_several_pictures_of_a_page_are_counted_and_none_divides_by_zero() -> None:
    clock = Clock()
    admission = make(1e9, clock=clock)
    reservation = admission.reserve(story(pages=1), num_pictures=3)
    for _ in range(3):
        for step in (10, 20, 20):
            clock.now += 3.0
            reservation.observe(Progress(page=1, step=step, steps=20))
        reservation.observe(PICTURE)
    assert not admission.load.work["decoder"]
    clock.now += 6.0
    reservation.observe(Progress(page=1, step=20, steps=20))
    other = admission.reserve(story("b"))
    reservation.observe(PICTURE)
    assert admission.wait_s(story("c")) > 0
    other.release()


def test_pictures_of_a_page_that_are_drawn_at_once_are_counted_one_by_one() -> None:
    admission = make(1e9)
    reservation = admission.reserve(story(pages=1), num_pictures=3)
    for step in range(1, 21):
        for picture in range(3):
            reservation.observe(Progress(page=1, step=step, steps=20), picture=picture)
    assert admission.load.work["decoder"] == {"a": pytest.approx(3 * FINISH_SAMPLES)}
    for picture in range(3):
        reservation.observe(PICTURE, picture=picture)
    assert not admission.load.work["decoder"]


def test_a_front_without_work_takes_the_others_speed_as_the_whole() -> None:
    busy, idle = make(), make()
    idle.others = dataclasses.replace(busy.load, num_running=1, per_s={"generator": 10.0, "decoder": 5.0})
    assert idle.wait_s(story()) == pytest.approx(4 * PICTURE_SAMPLES / 5.0)
