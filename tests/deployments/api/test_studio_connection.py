"""What the studio does when its connection is refused: its own file in node, with a browser that is not there."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

HELPER = Path(__file__).parents[2] / "helpers" / "studio.mjs"
NODE = shutil.which("node")
pytestmark = [pytest.mark.skipif(not NODE, reason="there is no node here"), pytest.mark.timeout(120)]

BEGINNING = f"""
import assert from "node:assert/strict";
import {{ openStudio, settle }} from "{HELPER.as_uri()}";

const REDRAW = "POST /v1/stories/story_1/pages/1/redraw", STORY = "GET /v1/stories/story_1";
const PAGE = {{ index: 1, text: "Once", image: null }};
const DONE = {{ id: "story_1", prompt: "A fox", status: "done", pages: [PAGE] }};
const count = (studio, call) => studio.calls.filter((one) => one === call).length;
const refused = (status, message) => [status, {{ error: {{ message }} }}];
"""


def run(scenario: str) -> None:
    """Run a scenario in node, which fails where it does not hold or does not end."""
    command = [str(NODE), "--input-type=module", "--eval", BEGINNING + scenario]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr


def test_a_redraw_that_waits_is_sent_after_a_refused_connection() -> None:
    run("""
        const studio = await openStudio();
        await studio.sources[0].tell("page", PAGE);
        const button = studio.button(1, "redraw");
        await studio.click(button);
        await studio.sources[0].refuse();
        await studio.pass();
        assert.equal(studio.sources.length, 2);
        assert.equal(count(studio, REDRAW), 0);
        assert.equal(button.disabled, true);
        await studio.sources[1].tell("done", DONE);
        assert.equal(count(studio, REDRAW), 1);
        assert.equal(button.disabled, false);
        assert.equal(studio.status(), "Page 1 is drawn.");
    """)


def test_a_story_that_is_gone_is_said_and_followed_no_more() -> None:
    run("""
        let isGone = false;
        const studio = await openStudio((call) => isGone && call === STORY ? refused(404, "no story_1") : null);
        await studio.sources[0].tell("page", PAGE);
        const button = studio.button(1, "redraw");
        isGone = true;
        await studio.sources[0].refuse();
        assert.equal(studio.status(), "no story_1");
        assert.deepEqual(studio.pauses(), []);
        assert.equal(studio.sources.length, 1);
        assert.equal(studio.get("stop").hidden, true);
        assert.equal(studio.get("begin").hidden, false);
        await studio.click(button);
        assert.equal(button.disabled, false);
    """)


def test_a_session_that_has_expired_asks_for_the_key_and_the_story_goes_on() -> None:
    run("""
        let isExpired = false;
        const studio = await openStudio((call) => {
            if (call === "POST /login") isExpired = false;
            return isExpired ? refused(401, "no key") : null;
        });
        await studio.sources[0].tell("page", PAGE);
        isExpired = true;
        await studio.sources[0].refuse();
        assert.equal(studio.get("login").open, true);
        await studio.click(studio.get("stop")); // a second call that needs the key
        await studio.get("login-form").onsubmit({ preventDefault() {} });
        await settle();
        assert.equal(studio.get("login").open, false);
        assert.equal(studio.calls.at(-1), "POST /v1/stories/story_1/cancel");
        await studio.pass();
        assert.equal(studio.sources.length, 2);
        await studio.sources[1].tell("done", DONE);
        assert.equal(studio.status(), "The story is finished.");
    """)


def test_a_login_that_is_closed_without_a_key_is_said_and_can_be_asked_for_again() -> None:
    run("""
        let isExpired = false;
        const studio = await openStudio(() => isExpired ? refused(401, "no key") : null);
        isExpired = true;
        await studio.sources[0].refuse();
        studio.get("login").close();
        await settle();
        assert.equal(studio.status(), "This server asks for a key.");
        assert.equal(studio.get("begin").hidden, false);
        await studio.click(studio.get("share"));
        assert.equal(studio.get("login").open, true);
    """)


def test_a_server_that_is_away_is_asked_after_pauses_that_grow() -> None:
    run("""
        const away = [() => refused(503, "starting"), () => { throw new TypeError("Failed to fetch"); }];
        let answer = () => null;
        const studio = await openStudio((call) => answer(call)), waited = [];
        for (let number = 0; number < 8; number++) {
            answer = away[number % 2];
            await studio.sources.at(-1).refuse();
            assert.equal(studio.status(), "The connection is lost; trying again ...");
            waited.push(...studio.pauses());
            await studio.pass();
        }
        assert.deepEqual(waited, [1000, 2000, 4000, 8000, 16000, 30000, 30000, 30000]);
        await studio.sources.at(-1).tell("page", PAGE);
        assert.equal(studio.status(), "Writing ...");
        await studio.sources.at(-1).refuse();
        assert.deepEqual(studio.pauses(), [1000]);
    """)


def test_a_story_that_ended_meanwhile_is_shown_as_it_ended() -> None:
    run("""
        for (const [status, said] of [["done", "The story is finished."], ["cancelled", "Stopped."],
                                      ["failed", "The story broke off: the disk is full"]]) {
            let ended = null;
            const studio = await openStudio((call) => ended && call === STORY ? [200, ended] : null);
            ended = { ...DONE, status, error: status === "failed" ? "the disk is full" : null };
            await studio.sources[0].refuse();
            assert.equal(studio.status(), said);
            assert.equal(studio.sources.length, 1);
            assert.equal(studio.get("after").hidden, false);
        }
    """)


def test_a_story_that_breaks_off_does_what_waited_for_its_end() -> None:
    run("""
        let ended = null;
        const studio = await openStudio((call) => ended && call === STORY ? [200, ended] : null);
        await studio.sources[0].tell("page", PAGE);
        await studio.click(studio.button(1, "redraw"));
        ended = { ...DONE, status: "failed", error: "the disk is full" };
        await studio.sources[0].tell("error", { error: { message: "the disk is full" } });
        assert.equal(studio.sources[0].readyState, 2);
        assert.equal(count(studio, REDRAW), 1);
    """)


def test_a_redraw_waits_for_the_page_that_is_added_before_it() -> None:
    run("""
        const studio = await openStudio();
        await studio.sources[0].tell("done", DONE);
        studio.get("go-on").onclick();
        studio.button(1, "redraw").onclick();
        await settle();
        assert.equal(studio.sources.length, 2);
        assert.equal(count(studio, REDRAW), 0);
        await studio.sources[1].tell("done", DONE);
        assert.equal(count(studio, REDRAW), 1);
        assert.equal(studio.get("go-on").disabled, false);
    """)


def test_what_waits_at_a_story_is_not_done_when_another_one_is_opened() -> None:
    run("""
        const other = { ...DONE, id: "story_2", prompt: "An owl" };
        const studio = await openStudio((call) => call === "GET /v1/stories/story_2" ? [200, other] : null);
        await studio.sources[0].tell("page", PAGE);
        await studio.click(studio.button(1, "redraw"));
        await studio.sources[0].refuse();
        await studio.openStory("story_2");
        await studio.pass();
        assert.equal(count(studio, REDRAW), 0);
        assert.equal(studio.sources.length, 1);
        await studio.click(studio.button(1, "redraw"));
        assert.equal(studio.calls.at(-1), "POST /v1/stories/story_2/pages/1/redraw");
    """)
