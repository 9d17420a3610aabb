"""The bench of the engines, on a tiny model with random weights: that it runs, and that it measures what it says."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import dataclasses
import json
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import engine_tables, goals, http_load, ratios, rounds, ways
from benchmarks import engines as bench
from benchmarks.alone import UNET_BATCH, Pictures, weight_bytes
from benchmarks.engine_pair import Engines
from benchmarks.load import DEFAULT, TINY, Load, spread
from benchmarks.lockstep import Lockstep
from benchmarks.machine_peak import measure_peak
from benchmarks.ours import Ours
from benchmarks.published import draw, new_pipeline
from benchmarks.turns import Measurements, running
from minigpt5.config import ModelConfig
from minigpt5.engine.decoder import DiffusionDecoder, encode
from minigpt5.engine.denoising import denoise
from minigpt5.engine.generator import VokenGenerator
from minigpt5.model.folder import DISTILLED_DRAW
from minigpt5.types import DISTILLED, Usage, Vokens
from tests.helpers.tiny import tiny_config, tiny_diffusion, tiny_language, tiny_mapper, tiny_tokenizer, tiny_vision

PEAK = {"float32_gflops_per_s": 100.0, "bfloat16_gflops_per_s": 200.0, "read_gb_per_s": 20.0, "copy_gb_per_s": 18.0}


def distilled_config() -> ModelConfig:
    return dataclasses.replace(tiny_config(), draw_distilled=DISTILLED_DRAW)


@pytest.fixture(scope="module")
def engines() -> Engines:
    config = distilled_config()
    generator = VokenGenerator(config, tiny_tokenizer(config), tiny_language(config), tiny_vision(config))
    diffusion = tiny_diffusion(config, is_distilled=True)
    return Engines(generator, DiffusionDecoder(config, tiny_mapper(config), diffusion))


class InThisProcess:
    """A program's side and the bench's in one process."""

    def __init__(self, measurements: Measurements) -> None:
        self.measurements = measurements

    def measure(self, name: str, **options: Any) -> Any:
        return json.loads(json.dumps(self.measurements[name](**json.loads(json.dumps(options)))))


class OverHttp(Ours):
    """The engines, where a server would stand."""

    def idle_cores(self) -> dict[str, float]:
        return {"ray": 0.1}

    def memory_gib(self) -> float:
        return 1.0


@pytest.fixture(scope="module")
def programs(engines: Engines) -> dict[str, InThisProcess]:
    measurements = {name: dict(make(engines, TINY)) for name, make in ways.WAYS.items()}
    measurements["limit"]["peak"] = lambda: dict(PEAK)
    return {name: InThisProcess(found) for name, found in measurements.items()}


@pytest.fixture(scope="module")
def kept() -> list[rounds.Figures]:
    """What the bench had after each round."""
    return []


@pytest.fixture(scope="module")
def figures(engines: Engines, programs: dict[str, InThisProcess], kept: list[rounds.Figures]) -> rounds.Figures:
    started: Any = {name: found for name, found in programs.items() if name != "long"}
    asked = rounds.Programs(**started, http=OverHttp(engines, TINY))
    return rounds.measure(asked, TINY, lambda figures, num_rounds: kept.append(copy.deepcopy(figures)))


@pytest.mark.slow
def test_it_measures_every_way_and_gives_the_ratios(
    figures: rounds.Figures, capsys: pytest.CaptureFixture[str]
) -> None:
    report = json.loads(json.dumps(bench.report_of(figures, TINY, {"vllm": "there is none", "llamacpp": "nor this"})))
    found = report["ratios"]
    assert set(found) == {goal.ratio for goal in goals.RATIO_GOALS}
    of_peers = {"tokens_1_vs_llamacpp", "tokens_1_vs_vllm", "tokens_16_vs_vllm"}
    assert {name for name, value in found.items() if value is None} == of_peers
    assert all(0 < value < 1000 for name, value in found.items() if name not in of_peers)
    bench.show(report)
    shown = capsys.readouterr().out
    assert "default_16_http_vs_limit" in shown and "not measured: vllm: there is none" in shown


@pytest.mark.slow
def test_what_ratios_need_is_measured_in_every_round(figures: rounds.Figures) -> None:
    default, guided = figures.stories[DEFAULT], figures.stories["20"]
    for measured in (default, guided):
        assert len(measured["published"]["stories_per_s"]) == len(measured["limit"]["stories_per_s"]) == TINY.rounds
        assert len(measured["bound_s"]) == TINY.rounds
        for num in ("1", "16"):
            assert len(measured["http"][num]["stories_per_s_of_rounds"]) == TINY.rounds
    assert set(default["http"]) == set(default["ours"]) == {"1", "2", "16"}
    assert len(default["http"]["2"]["stories_per_s_of_rounds"]) == 1
    assert default["ours"]["2"]["story_s"]["num"] == 2
    assert all(len(values) == TINY.rounds for values in figures.peak.values())


@pytest.mark.slow
def test_a_run_that_is_stopped_has_the_ratios_of_its_rounds(
    figures: rounds.Figures, kept: list[rounds.Figures]
) -> None:
    assert [len(one.stories[DEFAULT]["bound_s"]) for one in kept] == [1, 2] and TINY.rounds == 2
    found = bench.report_of(kept[0], TINY, {"rest": "the run ended after 1 of 2 rounds"})
    of_peers = {"tokens_1_vs_llamacpp", "tokens_1_vs_vllm", "tokens_16_vs_vllm"}
    assert {name for name, value in found["ratios"].items() if value is None} == of_peers
    assert "| default | over HTTP, 16 at once |" in engine_tables.engines_load({"engines": found["figures"]})
    assert figures.stories[DEFAULT]["http"]["1"].keys() == kept[0].stories[DEFAULT]["http"]["1"].keys()


@pytest.mark.slow
def test_a_run_that_fails_leaves_its_rounds_beside_the_results(
    kept: list[rounds.Figures], figures: rounds.Figures, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(programs: object, load: Load, keep: Callable[[rounds.Figures, int], None]) -> rounds.Figures:
        keep(kept[0], 1)
        raise RuntimeError("a program ended")

    monkeypatch.setattr(bench, "running_programs", lambda options, missing: contextlib.nullcontext())
    monkeypatch.setattr(bench, "measure", measure)
    out = tmp_path / "engines.json"
    out.write_text("the last whole run")
    with pytest.raises(RuntimeError, match="a program ended"):
        bench.main(["--tiny", "--out", str(out)])
    assert out.read_text() == "the last whole run"
    partial = json.loads((tmp_path / "engines.json.partial").read_text())
    assert partial["figures"]["not_measured"] == {"rest": "the run ended after 1 of 2 rounds"}
    assert partial["ratios"]["overlap"] > 0
    monkeypatch.setattr(bench, "measure", lambda programs, load, keep: figures)
    monkeypatch.setattr(bench, "measure_long_prompt", lambda options: {"ratio": 1.0})
    bench.main(["--tiny", "--out", str(out)])
    assert json.loads(out.read_text())["figures"]["not_measured"] == {}
    assert [path.name for path in tmp_path.iterdir()] == ["engines.json"]


@pytest.mark.slow
def test_its_tables_show_what_was_measured(figures: rounds.Figures) -> None:
    found = {"engines": bench.report_of(figures, TINY, {})["figures"]}
    assert "| 20 steps | over HTTP, 16 at once |" in engine_tables.engines_load(found)
    assert "| tokens/s of one text, over vLLM | not measured | at least 3 |" in engine_tables.engines_ratios(found)
    assert "| text, tokens/s, vLLM on the CPU, bfloat16 | - | - | - |" in engine_tables.engines_alone(found)
    assert "GB/s read | 20 |" in engine_tables.engines_more(found)


def test_a_ratio_is_the_median_over_the_rounds() -> None:
    assert ratios.over([1.0, 4.0, 9.0], [2.0, 2.0, 3.0]) == 2.0
    assert ratios.over([1.0], None) is None and ratios.over([], [1.0]) is None


def test_a_share_of_the_machine_is_of_its_highest_peak() -> None:
    measured = rounds.Figures(
        stories={},
        text={"ours": {"1": [50.0, 40.0]}},
        unet={"flops_a_sample": 2e9, "seconds_a_sample": [0.04, 0.02]},
        weight_bytes=100_000_000,
        peak={name: [value, value] for name, value in PEAK.items()},
    )
    found = ratios.compute(measured)
    assert found["peak_share_unet"] == pytest.approx((50 + 100) / 2 / 200)
    assert found["bandwidth_share_tokens"] == pytest.approx((5 + 4) / 2 / 20)
    assert found["overlap"] is None


def test_goals_say_which_ratios_reach_their_bounds() -> None:
    found: dict[str, float | None] = {goal.ratio: 1.0 for goal in goals.RATIO_GOALS}
    found["overlap"] = None
    rows = {row["ratio"]: row["reached"] for row in goals.compare_ratios(found)}
    assert rows["default_16_http_vs_limit"] and rows["default_1_http_vs_bound"]
    assert rows["tokens_1_vs_vllm"] is False and rows["picture_seconds_1_vs_eager"] is False
    assert rows["overlap"] is None and rows["peak_share_unet"] is None
    lines = goals.ratios_to_text(found).splitlines()
    assert any(line.split() == ["overlap", "null", "at", "most", "1.15"] for line in lines)


def test_the_published_way_draws_the_picture_of_a_default_request(engines: Engines) -> None:
    """By diffusers' pipeline with the distilled UNet: the latents are those of the engine."""
    config, decoder = engines.config, engines.decoder
    settings = config.default_draw
    assert (settings.scheduler, settings.steps, settings.guidance_scale) == (DISTILLED, 4, 1.0)
    states_1VH = torch.randn(1, config.num_vokens, config.hidden)
    with torch.no_grad():
        (png,) = draw(new_pipeline(decoder, settings), decoder, states_1VH, settings, seed=5)
        pixels = denoise(decoder.diffusion, decoder.mapper(states_1VH), decoder.null_1QD, seeds=[5], draw=settings)
    assert png == encode(pixels, "PNG")[0]


@pytest.mark.parametrize("pictures", [DEFAULT, "2"])
def test_lockstep_calls_the_denoiser_as_often_as_the_engine(engines: Engines, pictures: str) -> None:
    config = engines.config
    scheduler = TINY.draw(pictures, config).scheduler
    denoiser, sizes = engines.decoder.diffusion.denoiser_for(scheduler), []
    hook = denoiser.register_forward_hook(lambda module, given, result: sizes.append(len(given[0])))
    try:
        Lockstep(engines, TINY).pictures(pictures, 3)
    finally:
        hook.remove()
    assert sizes == ([3] * 4 if pictures == DEFAULT else [6] * 2)  # guidance takes two samples


def test_the_denoisers_operations_are_those_of_a_sample(engines: Engines) -> None:
    alone = Pictures(engines.decoder, TINY)
    sizes: list[int] = []
    hook = engines.decoder.diffusion.distilled.register_forward_hook(
        lambda module, given, result: sizes.append(len(given[0]))
    )
    try:
        assert alone.unet_flops() > 1e5
    finally:
        hook.remove()
    assert sizes == [UNET_BATCH]


def test_weights_that_a_token_reads_are_counted_once() -> None:
    config = tiny_config()
    language = tiny_language(config)
    num_read = sum(parameter.numel() for name, parameter in language.body.named_parameters() if "embed" not in name)
    head_bytes = language.head.weight.nbytes
    buffers = sum(buffer.nbytes for buffer in language.body.buffers())
    assert weight_bytes(language) == 4 * num_read + head_bytes + buffers
    linears = sum(isinstance(part, nn.Linear) for part in language.body.modules())
    assert linears
    language.pack()
    packed_head_bytes = 4 * config.vocabulary * config.hidden
    numbers_of_norms = 64  # bytes at most: a lean norm keeps its epsilon as a tensor
    assert 0 <= weight_bytes(language) - (4 * num_read + packed_head_bytes + buffers) <= numbers_of_norms


def test_the_machines_peak_is_measured() -> None:
    found = measure_peak(side=256, read_bytes=2**20)  # of its own size one product in bfloat16 can take a minute
    assert set(found) == set(PEAK) and all(value > 0 for value in found.values())


def test_its_stories_have_as_many_tokens_as_they_say(engines: Engines) -> None:
    async def collect() -> list[object]:
        (story,) = engines.new_stories(1, TINY, pictures=DEFAULT)
        return [event async for event in engines.generator.generate(story)]

    events = asyncio.run(collect())
    assert sum(isinstance(event, Vokens) for event in events) == 2
    usage = events[-1]
    assert isinstance(usage, Usage) and usage.completion_tokens == 2 * (6 + 8)


def test_its_texts_have_as_many_tokens_as_the_peers(engines: Engines) -> None:
    async def collect() -> list[object]:
        (text,) = engines.new_texts(1, TINY)
        return [event async for event in engines.generator.generate(text)]

    usage = asyncio.run(collect())[-1]
    assert isinstance(usage, Usage) and usage.completion_tokens == TINY.text_tokens + 8  # and the vokens' pass


def test_no_two_of_its_stories_are_alike() -> None:
    stories = [Load().story(index, tiny_config(), pictures="20") for index in range(90)]
    assert len({story.prompt for story in stories}) == 90


def test_a_story_has_the_folders_own_settings_but_for_the_length_of_pages() -> None:
    config = distilled_config()
    story = Load().story(0, config, pictures=DEFAULT)
    assert (story.pages, story.draw) == (4, DISTILLED_DRAW)
    lengths = {"min_page_tokens": 48, "max_page_tokens": 48}
    assert story.sampling == dataclasses.replace(config.sampling, **lengths)
    assert Load().story(0, config, pictures="50").draw == dataclasses.replace(config.draw, steps=50)


@pytest.mark.slow
def test_the_gap_between_tokens_is_measured_with_and_without_a_long_prompt(programs: dict[str, InThisProcess]) -> None:
    found = programs["long"].measure("gaps")
    assert found["ratio"] == pytest.approx(found["p95_with_s"] / found["p95_without_s"])


def test_a_percentile_needs_its_samples() -> None:
    assert set(spread(range(299))) == {"p50", "p95", "num"}
    assert set(spread(range(300))) == {"p50", "p95", "p99", "num"}
    assert spread([]) == {}


def test_without_the_peers_environment_the_run_says_so(tmp_path: Path) -> None:
    options = bench.parse(["--peers", str(tmp_path)])
    missing: dict[str, str] = {}
    assert bench.peer_commands(options, tmp_path, missing) == {}
    assert set(missing) == {"llamacpp", "vllm"} and "make install-peers" in missing["vllm"]


def test_a_peer_that_cannot_compute_is_found_at_its_start() -> None:
    dies = [sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGILL)"]
    with pytest.raises(RuntimeError, match="ended with -4"), running(dies):
        pytest.fail("it has not loaded")


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
    http_load.main([url, DEFAULT, "3", "7", "--load", "tiny"])
    figures = json.loads(capsys.readouterr().out)
    assert figures["stories_per_s"] > 0
    for name in ("story_s", "first_text_s", "first_picture_s", "page_cadence_s"):
        assert figures[name]["num"] == 3
    asked = TINY.story(7, distilled_config(), pictures=DEFAULT)
    first = min(Stories.bodies, key=lambda body: str(body["seed"]))
    assert (first["path"], first["prompt"], first["seed"]) == ("/v1/stories", asked.prompt[0], asked.seed)
    assert (first["pages"], first["steps"], first["scheduler"]) == (2, 4, DISTILLED)
    assert (first["min_page_tokens"], first["max_page_tokens"]) == (6, 6)
