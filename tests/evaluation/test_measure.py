"""Samples become metrics: each by its group, with what is missing named, whatever order they come in."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from minigpt5.evaluation import alignment, frechet
from minigpt5.evaluation.metrics import METRICS
from minigpt5.evaluation.protocols import measure as module
from minigpt5.evaluation.protocols.measure import Measures
from minigpt5.evaluation.protocols.of_samples import OF_SAMPLES
from minigpt5.evaluation.protocols.protocol import Sample
from minigpt5.evaluation.protocols.report import to_html
from minigpt5.evaluation.protocols.scorers import NEEDS, Scorers, load_scorers
from minigpt5.evaluation.protocols.sheets import PLACES, Sheets
from minigpt5.evaluation.protocols.table import PROTOCOLS
from minigpt5.storybook.captions import Facts
from minigpt5.storybook.scenes import draw_scene, scene_at
from minigpt5.storybook.scorer import load_scorer

CC3M, MMDIALOG, STORY, VIST = (PROTOCOLS[name] for name in ("cc3m", "mmdialog", "story", "vist"))


class Colours(nn.Module):
    """Stands for a network of many features: means of colours and of their products."""

    num_features = 12

    def forward(self, pictures_BCYX: Tensor) -> Tensor:
        means_BC = pictures_BCYX.float().mean(dim=(2, 3)) / 255
        return torch.cat([means_BC, means_BC**2, means_BC**3, means_BC.roll(1, 1) * means_BC], dim=1)


def noise(seed: int, px: int = 12) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 30 + seed * 7 % 220, (px, px, 3), np.uint8)


def sample(row: str, **fields: Any) -> Sample:
    return Sample(**{"row": row, "key": "k", "groups": ("all",), "said_first": fields.get("said"), **fields})


def results(measures: Measures) -> dict[tuple[str, str], dict[str, Any]]:
    return {(one["group"], one["metric"]): one for one in measures.results()}


def test_every_metric_of_a_protocol_is_known_and_computed_somewhere() -> None:
    of_sets = {"fid", "fid_published", "inception_score", "efficientnet_distance", "bleu_1", "bleu_2"}
    by_protocols = {"draw_precision", "draw_recall", "structure", "no_picture", "no_text", "judge"}
    for protocol in PROTOCOLS.values():
        assert set(protocol.metrics) <= METRICS.keys() & (OF_SAMPLES.keys() | of_sets | by_protocols)
        assert {name.partition("/")[0] for name in protocol.sheets} <= set(protocol.metrics)
    assert set(NEEDS) <= METRICS.keys()


def test_values_of_the_protocol_become_precision_and_recall() -> None:
    measures = Measures(MMDIALOG, Scorers())
    turns = [
        ("a", {"draw_precision": 1.0, "draw_recall": 1.0}),
        ("a", {"draw_precision": 0.0}),
        ("b", {"draw_recall": 0.0}),
    ]
    for row, values in turns:
        measures.add([sample(row, values=values)])
    found = results(measures)
    assert found["all", "draw_precision"]["mean"] == 0.5 and found["all", "draw_precision"]["n"] == 2
    assert found["all", "draw_recall"]["mean"] == 0.5 and found["all", "draw_recall"]["rows"] == 2


def test_published_text_metrics_are_means_of_dialogues_and_the_others_of_turns() -> None:
    measures = Measures(MMDIALOG, Scorers())
    measures.add([sample("a", key=str(number), said="x y", reference="x y") for number in range(3)])
    measures.add([sample("b", said="p", reference="q r")])
    found = results(measures)
    assert found["all", "rouge_l"]["mean"] == pytest.approx(0.75)
    assert found["all", "rouge_l_published"]["mean"] == pytest.approx(0.5)
    assert found["all", "bleu_1"]["n"] == 4 and ("all", "sbert") not in found


def test_published_forms_end_at_the_picture_and_leave_out_what_has_no_true_text() -> None:
    measures = Measures(MMDIALOG, Scorers(parts={"clip": FakeClip()}))
    measures.add(
        [
            sample("a", key="2", said="wow then more", said_first="wow", reference="wow"),
            sample("a", key="3", said="!", reference="wow !"),
            sample("a", key="4", said="wow", reference="..."),
        ]
    )
    found = results(measures)
    for metric in ("rouge_l_published", "bleu_1_published", "bleu_2_published"):
        assert found["all", metric]["mean"] == pytest.approx(0.5) and found["all", metric]["n"] == 2
    assert found["all", "rouge_l"]["n"] == 3
    precision, recall = 1 / 2, 1 / 2  # "!" and "..." are no texts: two of each are left, and one pair
    expected = 2 * precision * recall / (precision + recall)
    assert found["all", "clip_f1_published"]["mean"] == pytest.approx(expected, rel=1e-5)


def test_a_resample_with_too_few_pictures_for_the_inception_score_counts_for_nothing() -> None:
    measures = Measures(MMDIALOG, Scorers(parts={"logits": Colours()}))
    for row, count in enumerate((4, 3, 2, 1, 1, 1)):
        measures.add([sample(str(row), key=str(number), drawn=noise(10 * row + number)) for number in range(count)])
    found = results(measures)["all", "inception_score"]
    assert found["n"] == 12 and found["mean"] >= 1 and found["low"] <= found["high"]


def test_the_published_fid_is_of_pictures_at_256_px() -> None:
    class Corner(nn.Module):
        num_features = 3

        def forward(self, pictures_BCYX: Tensor) -> Tensor:
            return pictures_BCYX[:, :, 0, 0].float() / 255 + pictures_BCYX.shape[-1]

    drawn, true = [noise(seed) for seed in range(6)], [noise(seed + 20, px=300) for seed in range(6)]
    measures = Measures(CC3M, Scorers(parts={"inception": Corner()}))
    measures.add(
        [sample(str(n), drawn=one, true=other) for n, (one, other) in enumerate(zip(drawn, true, strict=True))]
    )
    found = results(measures)
    assert found["all", "fid_published"]["mean"] == pytest.approx(frechet.fid(drawn, true, Corner(), px=256), rel=1e-4)
    as_they_are = frechet.frechet_distance(frechet.extract(true, Corner()), frechet.extract(drawn, Corner()))
    assert found["all", "fid"]["mean"] == pytest.approx(as_they_are, rel=1e-4) and as_they_are > 3 * 280**2


def test_a_sets_distance_is_the_one_of_all_its_pictures() -> None:
    scorers = Scorers(parts={"efficientnet": Colours()})
    drawn, true = [noise(seed) for seed in range(8)], [noise(seed + 20) for seed in range(8)]
    measures = Measures(CC3M, scorers)
    for number, (one, other) in enumerate(zip(drawn, true, strict=True)):
        measures.add([sample(str(number), drawn=one, true=other)])
    found = results(measures)["all", "efficientnet_distance"]
    assert found["mean"] == pytest.approx(frechet.efficientnet_distance(drawn, true, Colours()), rel=1e-5)
    assert found["n"] == 8 and found["low"] < found["mean"] < found["high"]


def test_a_distance_in_the_space_that_is_spanned_is_the_same() -> None:
    features = {str(row): [module._Feature(bool(row % 2), torch.randn(40))] for row in range(10)}
    reduced = module._reduce(features)
    assert len(reduced["0"][0].values_D) == 10
    everything, fewer = ([one for row in rows.values() for one in row] for rows in (features, reduced))
    assert module._distance(everything) == pytest.approx(module._distance(fewer), rel=1e-4)


def test_a_single_picture_has_no_distance() -> None:
    measures = Measures(CC3M, Scorers(parts={"efficientnet": Colours()}))
    measures.add([sample("a", drawn=noise(1), true=noise(2))])
    assert ("all", "efficientnet_distance") not in results(measures)


def test_a_picture_is_measured_by_the_facts_that_its_caption_says() -> None:
    scenes = [scene_at(index, seed=3, split="validation") for index in range(6)]
    scorer = load_scorer()
    shown = scorer.score(np.stack([draw_scene(one) for one in scenes]))
    measures = Measures(CC3M, Scorers(parts={"world": scorer}))
    for number, (scene, facts) in enumerate(zip(scenes, shown, strict=True)):
        asked = Facts(who=facts.who, place="nowhere" if number == 0 else facts.place)
        measures.add([sample(str(number), drawn=draw_scene(scene), facts=asked)])
    found = results(measures)
    assert found["all", "fact_accuracy"]["mean"] == pytest.approx(5 / 6)
    assert found["all", "fact_accuracy/who"]["mean"] == 1 and found["all", "fact_accuracy/place"][
        "mean"
    ] == pytest.approx(5 / 6)
    assert ("all", "fact_accuracy/time") not in found


class FakeClip:
    """Stands for CLIP: a text or a picture is a direction of two, by its length or its brightness."""

    logit_scale = 10.0

    def embed(self, part: alignment.Part) -> Tensor:
        angle = len(part) / 10 if isinstance(part, str) else float(part.mean()) / 255
        return torch.tensor([np.cos(angle), np.sin(angle)])

    def embed_texts(self, texts: list[str]) -> Tensor:
        return torch.stack([self.embed(one) for one in texts])

    embed_pictures = embed_texts


def test_a_dialogues_relevance_is_that_of_its_parts() -> None:
    white = np.full((4, 4, 3), 255, np.uint8)
    measures = Measures(MMDIALOG, Scorers(parts={"clip": FakeClip()}))
    measures.add(
        [
            sample("a", key="2", said="abc", reference="abcdef", parts=("abc",)),
            sample("a", key="3", said="abc", reference="abc", drawn=white, true=white, parts=("abc", white)),
            sample("a", key="4", said="abc", reference="abc", drawn=white, parts=("abc", white)),
        ]
    )
    found = results(measures)
    # Four pairs: cosines cos(0.3), 1, 1 and 1; times the scale.
    assert found["all", "mm_relevance"]["mean"] == pytest.approx(10 * (np.cos(0.3) + 3) / 4, rel=1e-5)
    total = np.cos(0.3) + 3
    precision, recall = total / 5, total / 4
    f1 = 2 * precision * recall / (precision + recall)
    assert found["all", "clip_f1_published"]["mean"] == pytest.approx(f1, rel=1e-5)


def test_a_reply_in_another_order_is_paired_as_it_stands() -> None:
    """The picture first, against the text first; and what comes after the true turn's parts counts for nothing."""
    white = np.full((4, 4, 3), 255, np.uint8)
    for parts, expected in (
        ((white, "abc"), 2 * np.cos(1 - 0.3)),  # white lies at 1, three letters at 0.3
        (("abc", white, "abcdef"), 2.0),
    ):
        measures = Measures(MMDIALOG, Scorers(parts={"clip": FakeClip()}))
        measures.add([sample("a", key="2", said="abc", reference="abc", drawn=white, true=white, parts=parts)])
        assert results(measures)["all", "mm_relevance"]["mean"] == pytest.approx(10 * expected / 2, rel=1e-5)


def test_likeness_of_pages_is_measured_by_distance() -> None:
    dark, white = np.zeros((8, 8, 3), np.uint8), np.full((8, 8, 3), 255, np.uint8)
    measures = Measures(STORY, Scorers(parts={"clip": FakeClip()}))
    pairs = [("distance 1", (dark, dark)), ("distance 1", (dark, white)), ("distance 2", (dark, white))]
    measures.add([sample("a", groups=(group,), pair=pair) for group, pair in pairs])
    found = results(measures)
    assert found["distance 1", "clip_consistency"]["mean"] == pytest.approx((1 + np.cos(1)) / 2, rel=1e-5)
    assert found["distance 2", "clip_consistency"]["mean"] == pytest.approx(np.cos(1), rel=1e-5)


def test_the_order_of_answers_changes_no_figure() -> None:
    samples = [
        sample(str(number), drawn=noise(number), true=noise(number + 9), said="a b", reference=f"a {number}")
        for number in range(9)
    ]
    found = []
    for order in (samples, samples[::-1]):
        measures = Measures(
            dataclasses.replace(CC3M, metrics=("efficientnet_distance", "rouge_l", "bleu_1")),
            Scorers(parts={"efficientnet": Colours()}),
        )
        for one in order:
            measures.add([one])
        found.append(measures.results())
    assert [one["metric"] for one in found[0]] == ["bleu_1", "rouge_l", "efficientnet_distance"]
    for one, other in zip(*found, strict=True):
        for name in ("mean", "low", "high"):
            assert one.pop(name) == pytest.approx(other.pop(name), rel=1e-6)
        assert one == other


def test_what_is_missing_is_named_with_the_reason() -> None:
    scorers = Scorers(absent={"clip": "name a CLIP model with --clip"})
    assert scorers.missing(("clip_i", "rouge_l", "fid")) == {
        "clip_i": "name a CLIP model with --clip",
        "fid": METRICS["fid"].needs,
    }
    found = load_scorers(("clip_i", "fid", "rouge_l"))
    assert not found.parts and set(found.missing(("clip_i", "fid", "rouge_l"))) == {"clip_i", "fid"}


# Pages


def a_run(**changes: Any) -> dict[str, Any]:
    entry = {"metric": "clip_t", "group": "all", "n": 3, "rows": 3, "mean": 0.25, "low": 0.2, "high": 0.3}
    return {
        "protocol": "cc3m",
        "about": "one picture for each caption",
        "system": {"name": "<b>model", "version": "f" * 64},
        "data": "rows",
        "seed": 0,
        "draw": {"steps": 4, "style": ""},
        "rows": {"asked": 4, "measured": 3, "errors": 1},
        "errors": {"a & b": 1},
        "unjudged": {"no <marks>": 2},
        "metrics": [entry, {**entry, "metric": "fact_accuracy/who", "low": None, "high": None}],
        "missing": {"fid": "name a file"},
        **changes,
    }


def test_the_page_stands_alone_and_escapes_what_it_shows() -> None:
    sheets = Sheets(CC3M)
    sheets.add(
        sample("<i>row", drawn=noise(1), true=noise(2), asked="<script>alert(1)</script>"), {"fact_accuracy": 1.0}
    )
    ranked_by, chosen = sheets.chosen()
    html = to_html(a_run(), chosen, ranked_by=ranked_by)
    assert "<script" not in html and "<i>row" not in html and "&lt;b&gt;model" in html and "a &amp; b" in html
    assert html.count("data:image/webp;base64,") == 6, "two pictures in the best, the worst and the random sheet"
    assert "http" not in html.replace("http-equiv", "")
    assert html.count("<svg") == 2 and "0.200 to 0.300" in html and "Facts shown: who" in html
    assert "Not judged" in html and "2 rows: no &lt;marks&gt;" in html
    assert "Best by Facts shown" in html and "name a file" in html and "Not measured" in html


def test_sheets_show_the_best_and_the_worst() -> None:
    sheets = Sheets(CC3M)
    for number in range(30):
        sheets.add(sample(f"{number:02}", said="x"), {"lpips": number / 30})
    metric, chosen = sheets.chosen()
    assert metric == "lpips"
    assert [one.row for one in chosen["Best"]] == [f"{number:02}" for number in range(PLACES)]
    assert [one.row for one in chosen["Worst"]] == [f"{number:02}" for number in range(29, 29 - PLACES, -1)]
    assert len(chosen["Random"]) == PLACES and [one.row for one in chosen["Random"]] != sorted(
        one.row for one in chosen["Random"]
    )


def test_where_the_ranking_metric_is_alike_the_next_one_decides() -> None:
    sheets = Sheets(CC3M)
    for row, fact, lpips in (("a", 1.0, 0.5), ("b", 1.0, 0.2), ("c", 0.0, 0.1), ("d", 0.0, 0.9)):
        sheets.add(sample(row, said="x"), {"fact_accuracy": fact, "lpips": lpips})
    metric, chosen = sheets.chosen()
    assert metric == "fact_accuracy"
    assert [one.row for one in chosen["Best"]] == ["b", "a", "c", "d"]
    assert [one.row for one in chosen["Worst"]] == ["d", "c", "a", "b"]


def test_sheets_of_a_protocol_with_a_main_group_show_that_group() -> None:
    sheets = Sheets(VIST)
    sheets.add(sample("a", groups=("steps/none",), said="x"), {"lpips": 0.1})
    sheets.add(sample("b", groups=("steps/both", "last/both"), said="x"), {"lpips": 0.2})
    assert [one.row for one in sheets.chosen()[1]["Best"]] == ["b"]
