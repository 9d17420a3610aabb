"""Stored rows in training: each once in an epoch, in an order of the seed, with the published tasks in them."""

from __future__ import annotations

import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from batch_jobs.dataset_readers import storybook_item
from batch_jobs.prepare import Part, to_parquet, write_part
from minigpt5.config import storybook
from minigpt5.errors import TrainingError
from minigpt5.model.pixels import to_tensor
from minigpt5.objective.losses import LossWeights
from minigpt5.objective.stored_example import ROW_SCHEMA, to_row
from minigpt5.published.data import COMMANDS
from tests.helpers.tiny import tiny_config
from tests.minigpt5.objective.test_losses import new_objective
from training.data.row_index import RowOrder
from training.data.stored import StoredExamples, to_example

CONFIG = storybook()


def prepare(folder: Path, kind: str, count: int) -> str:
    for number, start in enumerate(range(0, count, 100)):
        part = Part(number=number, file="", start=start, count=min(100, count - start))
        write_part(part, layout=f"storybook:{kind}", uri="", output=str(folder), seed=3)
    return str(folder)


def row_of(kind: str, index: int = 0) -> dict[str, Any]:
    return to_row(storybook_item(kind, index, 3), source="storybook", read=lambda name: b"")


def sample(stored: dict[str, Any], number: int, *, stage: str = "learn", story_share: float = 0.0) -> Any:
    rng = np.random.default_rng(number)
    return to_example(stored, rng, stage=stage, story_share=story_share, read_px=64, draw_px=32)


def spell(row: Any) -> str:
    return "".join({"text": one.text, "read": "<R>", "draw": "<D>"}[one.kind] for one in row.segments)


def ids_at(rows: StoredExamples, start: int, count: int) -> list[str]:
    return [rows.stored(start + place)["id"] for place in range(count)]


def test_every_row_comes_once_in_an_epoch_and_none_of_those_kept_for_validation(tmp_path: Path) -> None:
    rows = StoredExamples(prepare(tmp_path, "caption", 950), CONFIG, stage="align", seed=1)
    kept = rows.held_out()
    assert len(rows) + len(kept) == 950 and 5 < len(kept) < 40
    epochs = [ids_at(rows, epoch * len(rows), len(rows)) for epoch in range(3)]
    held_out = ids_at(kept, 0, len(kept))
    for epoch in epochs:
        assert len({*epoch, *held_out}) == 950
    assert epochs[0] != epochs[1] != epochs[2]
    again, other = (StoredExamples(str(tmp_path), CONFIG, stage="align", seed=seed) for seed in (1, 2))
    assert ids_at(again, 0, 100) == epochs[0][:100] != ids_at(other, 0, 100)


def test_few_groups_are_read_at_a_time_and_each_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    read_group = StoredExamples._read_group
    monkeypatch.setattr(StoredExamples, "_read_group", lambda self, at: read.append(at) or read_group(self, at))
    rows = StoredExamples(prepare(tmp_path, "caption", 950), CONFIG, stage="align", seed=1)
    ids_at(rows, 0, 200)
    assert len(read) <= 8
    ids_at(rows, 200, len(rows) - 200)
    assert sorted(read) == sorted(set(read)) and len(rows._cache) <= 16


def test_a_stage_reads_no_column_that_it_does_not_use(tmp_path: Path) -> None:
    uri = prepare(tmp_path, "caption", 60)
    for stage, unread in (("align", {"features"}), ("vision", {"moments"}), ("learn", set())):
        segment = StoredExamples(uri, CONFIG, stage=stage, seed=1).stored(0)["segments"][0]
        assert set(segment) == {"text", "speaker", "picture", "caption", "moments", "features"} - unread


@pytest.mark.parametrize("sizes", [[3], [0, 0, 5], [1] * 40, [64] * 24, [0] * 20 + [7] + [0] * 20])
def test_an_order_has_every_row_of_every_group_once_an_epoch(sizes: list[int]) -> None:
    order = RowOrder(np.array(sizes, np.int32), seed=5)
    expected = sorted((group, number) for group, size in enumerate(sizes) for number in range(size))
    for epoch in range(2):
        places = [order.place_at(epoch * len(expected) + at) for at in range(len(expected))]
        assert sorted((place.group, place.number) for place in places) == expected


def test_a_reader_is_sent_to_another_process(tmp_path: Path) -> None:
    examples = StoredExamples(prepare(tmp_path, "story", 40), CONFIG, seed=1, stage="learn", story_share=0.5)
    one_id, one = examples.example_at(7)
    other_id, other = pickle.loads(pickle.dumps(examples)).example_at(7)
    assert one_id == other_id and spell(one) == spell(other)
    assert all((a == b).all() for a, b in zip(one.drawn, other.drawn, strict=True))


def test_captions_are_learnt_as_they_are_and_seldom_as_a_command() -> None:
    stored = row_of("caption")
    words = stored["segments"][0]["text"]
    spelt = Counter(spell(sample(stored, number, stage="align")) for number in range(600))
    assert spelt.most_common(1)[0][0] == f"{words}<D> ###"
    commands = {text: count for text, count in spelt.items() if "###Human:" in text}
    assert 0 < sum(commands.values()) < 30 and all(any(one in text for one in COMMANDS) for text in commands)


def test_a_story_gives_all_published_tasks_and_a_whole_story() -> None:
    stored = row_of("story")
    texts = [one["text"] for one in stored["segments"] if one["text"]]
    spelt = [spell(sample(stored, number)) for number in range(300)]
    assert any("scene description: " in text and text.endswith("<D> ###") for text in spelt)
    assert any(f"###Assistant:{texts[1]} <D> ###" in text for text in spelt)
    assert any(text.endswith(f"<R></Img> ###Assistant:{texts[1]} ###") for text in spelt)
    for number in range(50):
        row = sample(stored, number)
        assert sum(one.kind == "read" for one in row.segments) == len(row.read)
        assert sum(one.kind == "draw" for one in row.segments) == len(row.drawn) == len(row.captions)
        assert all(picture.shape == (64, 64, 3) for picture in row.read)
        assert all(picture.shape == (32, 32, 3) for picture in row.drawn)
    whole = sample(stored, 0, story_share=1.0)
    assert spell(whole).count("<D>") == len(texts) and stored["prompt"] in spell(whole)


def test_a_dialogue_gives_a_turn() -> None:
    talks = [row_of("dialogue", index) for index in (0, 1, 2, 4, 5)]
    spelt = [spell(sample(stored, number)) for stored in talks for number in range(30)]
    assert any(text.endswith("<D> ###") for text in spelt) and any("<R>" in text for text in spelt)
    assert all("###Human:" in text for text in spelt)


def test_long_turns_end_the_dialogues_of_mmdialog_alone() -> None:
    """Its authors' limit of 50 words is not one of a user's own rows."""
    stored = row_of("dialogue")
    turns = [one for one in stored["segments"] if one["text"]]
    turns[1]["text"] = " ".join(["word"] * 60)
    learnt = {}
    for source in ("folder", "mmdialog"):
        row = {**stored, "source": source}
        examples = [sample(row, number) for number in range(40)]
        learnt[source] = {one.text.strip(" #") for example in examples for one in example.segments if one.is_target}
    later = {turn["text"] for turn in turns[1:]}
    assert later <= learnt["folder"]
    assert not any(turn["text"] in learnt["mmdialog"] for turn in turns[1:])


def test_rows_that_are_not_there_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="python -m batch_jobs.prepare"):
        StoredExamples(str(tmp_path), CONFIG, stage="align", seed=1)
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "part-0.parquet").write_bytes(to_parquet([], ROW_SCHEMA))
    with pytest.raises(TrainingError, match="no rows for training"):
        StoredExamples(str(tmp_path), CONFIG, stage="align", seed=1)


def test_encoded_pictures_train_as_the_pictures_do() -> None:
    """The losses of moments and features are those of the pictures they were made of, but for float16."""
    objective, config = new_objective(), tiny_config()
    stored = row_of("story", 1)
    plain = to_example(
        stored,
        np.random.default_rng(5),
        stage="learn",
        story_share=0.0,
        read_px=config.vision.image_px,
        draw_px=config.image_px,
    )
    encoded = {key: value for key, value in vars(plain).items()}
    with torch.no_grad():
        pixels = to_tensor(np.stack(plain.drawn))
        moments = objective.diffusion.vae.encode(pixels).latent_dist.parameters.half().numpy()
        features = objective.vision.encode(np.stack(plain.read)).half().numpy() if plain.read else []
    encoded |= {"drawn": list(moments), "read": list(features)}
    losses = []
    for row in (plain, type(plain)(**encoded)):
        torch.manual_seed(0)
        losses.append(objective([row], LossWeights(text=1.0, picture=1.0, caption=0.0)))
    for name, loss in losses[0].items():
        assert loss.item() == pytest.approx(losses[1][name].item(), rel=2e-2), name
    objective.samples_latents = True
    torch.manual_seed(0)
    sampled = objective([plain], LossWeights(text=1.0, picture=1.0, caption=0.0))["picture"].item()
    assert sampled != losses[0]["picture"].item()


def test_a_stage_of_pictures_passes_over_rows_that_have_none(tmp_path: Path) -> None:
    """Such as the turns of a dialogue in words alone, which "learn" reads."""
    rows = [row_of("caption", index) for index in range(12)]
    bare = [
        {**row, "segments": [one for one in row["segments"] if one["picture"] is None]} if index % 3 else row
        for index, row in enumerate(rows)
    ]
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "0.parquet").write_bytes(to_parquet(bare, ROW_SCHEMA))
    examples = StoredExamples(str(tmp_path), CONFIG, stage="align", seed=1)
    drawn = {examples.example_at(position)[0] for position in range(2 * len(examples))}
    assert drawn <= {row["id"] for row in rows[::3]} and len(drawn) > 1

    (tmp_path / "rows" / "0.parquet").write_bytes(to_parquet([bare[1], bare[2], bare[4]], ROW_SCHEMA))
    with pytest.raises(TrainingError, match="no row of .* has a picture, which align learns from"):
        StoredExamples(str(tmp_path), CONFIG, stage="align", seed=1).example_at(0)
