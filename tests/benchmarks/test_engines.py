"""The bench of the engines, on a tiny model with random weights: that it runs, and that it measures what it says."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from benchmarks import engines as bench
from benchmarks import http_load
from benchmarks.load import TINY, Load, spread
from minigpt5.config import storybook
from minigpt5.engine.decoder import DiffusionDecoder
from minigpt5.engine.generator import VokenGenerator
from minigpt5.types import Usage, Vokens
from tests.helpers.tiny import tiny_config, tiny_diffusion, tiny_language, tiny_mapper, tiny_tokenizer, tiny_vision


@pytest.fixture(scope="module")
def engines() -> bench.Engines:
    config = tiny_config()
    generator = VokenGenerator(config, tiny_tokenizer(config), tiny_language(config), tiny_vision(config))
    return bench.Engines(generator, DiffusionDecoder(config, tiny_mapper(config), tiny_diffusion(config)))


def test_it_measures_every_way_and_gives_the_ratios(engines: bench.Engines) -> None:
    by_way = {way: measure(engines, TINY) for way, measure in bench.WAYS.items()}
    assert by_way["long_prompt"]["long_prompt"]["ratio"] > 0
    ways = by_way["ours"]["by_steps"]["2"] | {way: by_way[way]["by_steps"]["2"] for way in ("baseline", "upper_bound")}
    ratios = bench.compare(ways, "ours")
    assert set(ratios) == {"stories_2_vs_baseline", "stories_2_vs_upper_bound", "latency_1_vs_baseline", "overlap"}
    assert all(0 < ratio < 100 for ratio in ratios.values())
    ours = ways["ours"]
    assert set(ours) == {"1", "2"}
    assert ours["2"]["story_s"]["num"] == 2 and ours["2"]["page_cadence_s"]["num"] == 2
    assert "p99" not in ours["2"]["story_s"]
    json.dumps(by_way)
    bench.show({"by_steps": {"2": ways}}, ratios)


def test_its_stories_have_as_many_tokens_as_they_say(engines: bench.Engines) -> None:
    async def collect() -> list[object]:
        return [event async for event in engines.generator.generate(engines.new_stories(1, TINY, steps=2)[0])]

    events = asyncio.run(collect())
    assert sum(isinstance(event, Vokens) for event in events) == 2
    usage = events[-1]
    assert isinstance(usage, Usage) and usage.completion_tokens == 2 * (6 + 8)


def test_no_two_of_its_stories_are_alike() -> None:
    stories = [Load().story(index, tiny_config(), steps=20) for index in range(90)]
    assert len({story.prompt for story in stories}) == 90


def test_the_gap_between_tokens_is_measured_with_and_without_a_long_prompt(engines: bench.Engines) -> None:
    load = dataclasses.replace(TINY, page_tokens=10, long_prompt_tokens=100)
    figures = asyncio.run(bench.measure_token_gaps(engines, load))
    assert figures["ratio"] == pytest.approx(figures["p95_with_s"] / figures["p95_without_s"])
    assert engines.generator.num_running == 0


def test_a_percentile_needs_its_samples() -> None:
    assert set(spread(range(299))) == {"p50", "p95", "num"}
    assert set(spread(range(300))) == {"p50", "p95", "p99", "num"}
    assert spread([]) == {}


class Stories(BaseHTTPRequestHandler):
    """Streams as the server does, at once."""

    bodies: list[dict[str, object]] = []

    def do_POST(self) -> None:  # noqa: N802 (http.server's name)
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.bodies.append({"path": self.path, **body})
        names = ["story"] + body["pages"] * ["text", "slot", "image", "page"] + ["done"]
        self.send_response(200)
        self.end_headers()
        self.wfile.write("".join(f"id: 0\nevent: {name}\ndata: {{}}\n\n" for name in names).encode())

    def log_message(self, *arguments: object) -> None: ...


@pytest.fixture
def url() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Stories)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_the_load_over_http_asks_for_the_same_stories(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    http_load.main([url, "2", "3", "7", "--tiny"])
    figures = json.loads(capsys.readouterr().out)
    assert figures["stories_per_s"] > 0
    for name in ("story_s", "first_text_s", "first_picture_s", "page_cadence_s"):
        assert figures[name]["num"] == 3
    asked = TINY.story(7, storybook(), steps=2)
    first = min(Stories.bodies, key=lambda body: str(body["seed"]))
    assert (first["path"], first["prompt"], first["seed"]) == ("/v1/stories", asked.prompt[0], asked.seed)
    assert (first["pages"], first["steps"], first["min_page_tokens"], first["max_page_tokens"]) == (2, 2, 6, 6)
