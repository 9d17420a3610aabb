"""The losses: what they reach, what they leave alone, and that the short cuts change nothing."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from minigpt5.config import LoraConfig, ModelConfig
from minigpt5.model.base_models import resolve
from minigpt5.model.decoders.load import load_diffusion
from minigpt5.model.language import LanguageModel, like_lengths
from minigpt5.model.mapper import Mapper
from minigpt5.model.published_template import PUBLISHED
from minigpt5.model.text_encoder import TextEncoder, load_text_encoder
from minigpt5.objective import objective as objective_module
from minigpt5.objective.dummy_examples import DummyExamples
from minigpt5.objective.example import Example
from minigpt5.objective.losses import LossWeights
from minigpt5.objective.objective import Objective
from minigpt5.objective.words import word_losses
from tests.helpers.pipelines import ernie_image, flux, sana, stable_diffusion_3, stable_diffusion_xl
from tests.helpers.tiny import (
    tiny_config,
    tiny_config_of,
    tiny_diffusion,
    tiny_language,
    tiny_mapper,
    tiny_tokenizer,
    tiny_vision,
)

CAPTIONS_ONLY = LossWeights(text=0.0, picture=0.0, caption=1.0)
PICTURE = np.full((32, 32, 3), 128, np.uint8)


class NarrowEncoder(torch.nn.Module):
    """The real text encoder, cut to the tiny condition."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.encoder = TextEncoder(resolve(config.text_encoder), num_positions=config.condition_length)
        self.width = config.condition_width

    def forward(self, captions: list[str]) -> torch.Tensor:
        return self.encoder(captions)[..., : self.width]


def new_objective(
    language: LanguageModel | None = None, *, config: ModelConfig | None = None, keeps_replay: bool = False
) -> Objective:
    config = config or tiny_config()
    return Objective(
        config,
        tiny_tokenizer(config),
        language or tiny_language(config),
        tiny_vision(config),
        tiny_mapper(config),
        tiny_diffusion(config),
        NarrowEncoder(config),  # type: ignore[arg-type]
        keeps_replay=keeps_replay,
    )


def caption(text: str) -> Example:
    return Example(segments=PUBLISHED.caption(text), read=[], drawn=[PICTURE], captions=[text], is_caption=True)


def story() -> Example:
    pages = ["A fox woke up.", "It saw a red balloon."]
    return Example(
        segments=PUBLISHED.story(["A fox"], 2, pages),
        read=[],
        drawn=[PICTURE, PICTURE],
        captions=["a fox", "a balloon"],
    )


def loss_of(objective: Objective, examples: list[Example], weights: LossWeights = CAPTIONS_ONLY) -> dict[str, float]:
    torch.manual_seed(0)
    return {name: loss.item() for name, loss in objective(examples, weights).items()}


def test_sequences_of_unlike_lengths_are_read_in_passes_of_their_own_and_lose_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def told(words: str, num_pages: int) -> Example:
        segments = PUBLISHED.story(["A fox."], num_pages, [words] * num_pages)
        return Example(segments=segments, read=[], drawn=[PICTURE] * num_pages, captions=["a fox"] * num_pages)

    described = Example(segments=PUBLISHED.describe("A fox."), read=[PICTURE], drawn=[], captions=[])
    examples = [told("It sat there and looked at the sea for a long time.", 4), described, told("It sat.", 1)]
    losses, passes = {}, []
    objective = new_objective()
    states = objective.language.states
    monkeypatch.setattr(
        objective.language, "states", lambda embeds, **_: passes.append(len(embeds)) or states(embeds, **_)
    )
    for cost in (0, 10**6):
        monkeypatch.setattr(objective_module, "PASS_COST", cost)
        objective.eval()
        objective.zero_grad()
        losses[cost] = objective(examples, LossWeights(text=1.0, picture=0.0, caption=1.0))
        losses[cost]["loss"].backward()
        losses[cost]["gradient"] = objective.mapper.queries.grad.clone()  # type: ignore[union-attr]
    assert passes == [1, 1, 1, 3]
    for name, loss in losses[0].items():
        torch.testing.assert_close(loss, losses[10**6][name], atol=1e-5, rtol=1e-4)


def test_passes_cost_least() -> None:
    assert like_lengths([400, 30, 35, 380], pass_cost=64) == [[1, 2], [0, 3]]
    assert like_lengths([40, 30, 35], pass_cost=64) == [[0, 1, 2]]
    assert like_lengths([7], pass_cost=64) == [[0]]
    rng = np.random.default_rng(0)
    for _ in range(20):
        lengths = rng.integers(1, 500, 8).tolist()
        groups = like_lengths(lengths, pass_cost=64)
        assert sorted(index for group in groups for index in group) == list(range(8))
        cost = sum(len(group) * max(lengths[index] for index in group) + 64 for group in groups)
        assert sum(lengths) < cost <= 8 * max(lengths) + 64


@pytest.mark.parametrize("num_vokens", [1, 8])
@pytest.mark.parametrize("has_quirks", [False, True])
def test_the_short_cut_for_bare_captions_changes_no_loss(has_quirks: bool, num_vokens: int) -> None:
    """A caption's own end is learnt, as published, and its text has no gradients; a story beside it changes neither."""
    config = dataclasses.replace(tiny_config(), published_quirks=has_quirks, num_vokens=num_vokens)
    objective = new_objective(config=config).eval()
    weights = LossWeights(text=1.0, picture=0.0, caption=1.0)
    captions = [caption("a fox beside a tent"), caption("an owl")]
    for examples in (captions, [captions[0], story(), captions[1]]):
        found = {}
        for is_whole in (False, True):
            # One weight of the body that is trained: now gradients must go through the text.
            next(objective.language.body.parameters()).requires_grad_(is_whole)
            objective.zero_grad()
            found[is_whole] = loss_of(objective, examples, weights)
            objective(examples, weights)["text"].backward()
            gradient = objective.language.voken_embeddings.embedding.grad
            assert gradient is not None
            found[is_whole]["gradient of the last voken"] = gradient[-2].norm().item()
        assert found[True] == pytest.approx(found[False], rel=1e-4)
        assert found[True]["gradient of the last voken"] > 0


def test_captions_and_stories_share_a_batch() -> None:
    """Rows are read in two groups; each picture still meets its own caption."""
    objective = new_objective(keeps_replay=True)
    torch.manual_seed(0)
    objective([story(), caption("a fox beside a tent")], CAPTIONS_ONLY)
    remembered = [one.target_PQD[0] for one in objective.replay_buffer._samples]
    expected = objective.text_encoder(["a fox beside a tent", "a fox", "a balloon"])
    null = objective.text_encoder([""])[0]
    for target, asked in zip(remembered, expected, strict=True):
        assert torch.allclose(target, asked, atol=1e-5) or torch.allclose(target, null, atol=1e-5)
    assert any(torch.allclose(target, asked, atol=1e-5) for target, asked in zip(remembered, expected, strict=True))


def test_workers_that_share_out_weights_call_the_same_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever their batches have: pictures that are read or drawn, contrasts, or none of them."""
    objective = new_objective()
    objective.dummies = DummyExamples(objective.config, reads_pictures=True)
    calls: list[str] = []
    for name in ("language.body", "vision", "mapper", "text_encoder", "diffusion.denoiser", "diffusion.vae.encoder"):
        objective.get_submodule(name).register_forward_hook(lambda *_, name=name: calls.append(name))
    written = Example(segments=PUBLISHED.describe("A fox."), read=[PICTURE], drawn=[], captions=[])
    contrasted = dataclasses.replace(caption("an owl"), contrasts=[["a fox", "a tent"]])
    made = []
    for examples in ([written], [contrasted], [caption("an owl")], [contrasted, caption("a fox")]):
        calls.clear()
        objective(examples, LossWeights(text=1.0, picture=1.0, caption=1.0, contrast=1.0))
        made.append(tuple(calls))
    assert len(set(made)) == 1, made
    assert made[0].count("text_encoder") == 3


def test_only_what_is_trained_gets_gradients() -> None:
    objective = new_objective()
    weights = LossWeights(text=0.01, picture=1.0, caption=0.1)
    losses = objective([story(), caption("an owl")], weights)
    assert losses["loss"].item() == pytest.approx(
        0.01 * losses["text"].item() + losses["picture"].item() + 0.1 * losses["caption"].item(), rel=1e-5
    )
    losses["loss"].backward()
    assert all(parameter.grad is None for parameter in objective.language.body.parameters())
    assert all(parameter.grad is None for parameter in objective.diffusion.parameters())
    for module in (objective.mapper.fc, objective.mapper.transformer, objective.language.voken_embeddings):
        assert any(float(p.grad.abs().sum()) > 0 for p in module.parameters() if p.grad is not None)


def test_the_adapter_learns_from_the_picture_too() -> None:
    language = tiny_language(tiny_config())
    language.add_adapter(LoraConfig(rank=2, alpha=4, dropout=0.0, targets=("q_proj", "v_proj")))
    objective = new_objective(language)
    objective.train()
    objective([story()], CAPTIONS_ONLY)["loss"].backward()
    trained = [p for name, p in language.body.named_parameters() if "lora_B" in name]
    assert trained and all(p.grad is not None for p in trained)


def test_a_row_without_pictures_has_a_text_loss_only() -> None:
    objective = new_objective()
    segments = PUBLISHED.next_page(["A fox woke up."], "It yawned.", "text", variant=0)
    row = Example(segments=segments, read=[PICTURE, PICTURE], drawn=[], captions=[])
    losses = objective([row], LossWeights(text=1.0, picture=1.0, caption=1.0))
    assert set(losses) == {"loss", "text"}
    losses["loss"].backward()


def test_replay_trains_the_mapper_towards_what_was_seen() -> None:
    objective = new_objective(keeps_replay=True)
    objective.standardise_captions(["a fox", "an owl", "a bear in the snow"])
    assert not len(objective.replay_buffer)
    objective([caption("a fox beside a tent"), caption("an owl")], CAPTIONS_ONLY)
    optimizer = torch.optim.AdamW(objective.mapper.parameters(), lr=3e-3)
    torch.manual_seed(0)
    losses = []
    for _ in range(60):
        loss = objective.replay(8, CAPTIONS_ONLY)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_what_has_no_caption_loss_is_replayed_too() -> None:
    """The picture loss alone, on all of the remembered pictures."""
    objective = new_objective(keeps_replay=True)
    pictures_only = LossWeights(text=0.0, picture=1.0, caption=0.0)
    torch.manual_seed(0)
    objective([story()], pictures_only)
    assert len(objective.replay_buffer) == 2
    losses = objective.replay(4, pictures_only)
    assert losses["loss"].item() == pytest.approx(losses["replayed picture"].item())


def test_without_guidance_dropout_no_caption_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "rand", lambda *size: torch.zeros(*size))  # every draw is below every share
    for share, num_null in ((0.0, 0), (0.1, 2)):
        objective = new_objective()
        objective.guidance_dropout = share
        seen: list[torch.Tensor] = []
        objective.mapper.register_forward_pre_hook(lambda module, inputs, seen=seen: seen.append(inputs[0]))
        objective([story()], CAPTIONS_ONLY)
        assert sum(not states_VH.any() for states_VH in seen[0]) == num_null


def test_a_mapper_without_layers_mixes_vokens_by_position() -> None:
    config = dataclasses.replace(tiny_config(), mapper_layers=0)
    mapper = Mapper(config)
    vokens_BVH = torch.randn(2, config.num_vokens, config.hidden)
    condition_BQD = mapper(vokens_BVH)
    assert condition_BQD.shape == (2, config.condition_positions, config.condition_width)
    assert not any("layers" in name for name, _ in mapper.named_parameters())
    states_BVW = mapper.fc(vokens_BVH)
    positions: Any = mapper.transformer.positions
    mixed_W = sum(positions.weight[3, v] * states_BVW[1, v] for v in range(config.num_vokens)) + positions.bias[3]
    norm: Any = mapper.transformer.decoder.norm
    assert torch.allclose(condition_BQD[1, 3], norm(mixed_W + mapper.queries[0, 3]), atol=1e-5)
    assert mapper.is_fresh


def test_nothing_is_kept_for_a_replay_that_never_comes() -> None:
    objective = new_objective()
    objective([caption("a fox")], CAPTIONS_ONLY)
    assert len(objective.replay_buffer) == 0


def test_the_oldest_pictures_make_room_for_new_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objective_module, "REPLAY_CAPACITY", 3)
    objective = new_objective(keeps_replay=True)
    for number in range(5):
        objective([caption(f"fox number {number}")], CAPTIONS_ONLY)
    targets = [one.target_PQD[0] for one in objective.replay_buffer._samples]
    expected = [objective.text_encoder([f"fox number {number}"])[0] for number in (2, 3, 4)]
    for target, other in zip(targets, expected, strict=True):
        torch.testing.assert_close(target, other)


def test_pictures_kept_before_the_picture_loss_began_are_replayed() -> None:
    objective = new_objective(keeps_replay=True)
    objective([caption("a fox")], CAPTIONS_ONLY)
    both = LossWeights(text=0.0, picture=1.0, caption=1.0)
    assert objective.replay(4, both)["replayed picture"].item() == 0
    objective([caption("an owl")], both)
    found = [objective.replay(4, both)["replayed picture"].item() for _ in range(4)]
    assert any(value > 0 for value in found)


def test_pictures_learn_to_read_like_words() -> None:
    objective = new_objective()
    examples = [
        Example(segments=[], read=[np.full((32, 32, 3), shade, np.uint8)], shown=[shown], drawn=[], captions=[])
        for shade, shown in ((20, "a fox at night"), (230, "an owl, in the snow"))
    ]
    optimizer = torch.optim.AdamW(objective.vision.qformer.parameters(), lr=3e-3)
    losses = []
    for _ in range(80):
        loss = word_losses(objective.language, objective.vision, objective.tokenizer, examples)
        optimizer.zero_grad()
        loss["loss"].backward()
        optimizer.step()
        losses.append(loss["words"].item())
    assert losses[-1] < 0.2 * losses[0]
    assert all(parameter.grad is None for parameter in objective.language.parameters())


STANDARDS = ["a fox", "an owl at night in the snow", "a bear who reads"]


def objective_of(maker: Any, folder: Path) -> Objective:
    """With the diffusion model and the text encoder of a tiny pipeline."""
    maker.make(folder, **next(iter(maker.VARIANTS.values())))
    config = tiny_config_of(folder)
    return Objective(
        config,
        tiny_tokenizer(config),
        tiny_language(config),
        tiny_vision(config),
        Mapper(config),
        load_diffusion(folder),
        load_text_encoder(folder, config),
    )


@pytest.mark.parametrize("maker", [sana, ernie_image, stable_diffusion_3], ids=lambda maker: maker.__name__)
def test_padding_is_no_part_of_the_captions_statistics(maker: Any, tmp_path: Path) -> None:
    objective = objective_of(maker, tmp_path)
    states_BQD, _ = objective.caption_loss.split(objective.text_encoder(STANDARDS))
    states_ND = torch.stack([state for states in states_BQD for state in states if float(state.abs().sum()) > 0])
    objective.standardise_captions(STANDARDS, start_there=True)
    spread_D = states_ND.std(dim=0)
    varies_D = spread_D > 0.2 * spread_D.median()
    torch.testing.assert_close(objective.caption_loss.scale_D[varies_D], spread_D[varies_D])
    norm = objective.mapper.transformer.decoder.norm
    torch.testing.assert_close(norm.bias, states_ND.mean(dim=0))
    if maker is not stable_diffusion_3:
        assert len(states_ND) < states_BQD.shape[0] * states_BQD.shape[1], "some positions are padding"
        target_BQD = objective.text_encoder(STANDARDS)
        is_empty_BQ = ~target_BQD.any(dim=-1)
        wrong_BQD = target_BQD + is_empty_BQ[..., None] * objective.caption_loss.scale_D
        share = float(is_empty_BQ.float().mean())
        assert objective.caption_loss(wrong_BQD, target_BQD).item() == pytest.approx(share), "it is learnt to be zero"


@pytest.mark.parametrize("maker", [flux, stable_diffusion_xl, stable_diffusion_3], ids=lambda maker: maker.__name__)
def test_the_captions_one_vector_is_half_of_their_loss(maker: Any, tmp_path: Path) -> None:
    objective = objective_of(maker, tmp_path)
    target_BQD = objective.text_encoder(STANDARDS)
    width = objective.config.condition_pooled
    states_BQD, pooled_BE = target_BQD[:, :-1], target_BQD[:, -1, :width]
    objective.standardise_captions(STANDARDS, start_there=True)
    assert objective.caption_loss.scale_D.median() == pytest.approx(float(states_BQD.flatten(0, 1).std(dim=0).median()))
    pooled = objective.mapper.pooled
    assert pooled is not None
    torch.testing.assert_close(pooled.bias, pooled_BE.mean(dim=0))
    wrong_BQD = target_BQD.clone()
    wrong_BQD[:, -1, :width] += objective.caption_loss.pooled_scale_E
    assert objective.caption_loss(wrong_BQD, target_BQD).item() == pytest.approx(0.5, rel=1e-4)
    wrong_BQD = target_BQD.clone()
    wrong_BQD[:, :-1] += objective.caption_loss.scale_D
    assert objective.caption_loss(wrong_BQD, target_BQD).item() == pytest.approx(0.5, rel=1e-4)
    others_BKQD = target_BQD.roll(1, dims=0)[:, None].clone()
    right = objective.caption_loss.contrast(target_BQD, target_BQD, others_BKQD).item()
    others_BKQD[:, 0, :-1] = target_BQD[:, :-1]
    by_vector = objective.caption_loss.contrast(target_BQD, target_BQD, others_BKQD).item()
    assert right <= by_vector < np.log(2), "the vector alone tells captions apart"


def test_a_single_caption_leaves_the_one_vector_unscaled(tmp_path: Path) -> None:
    objective = objective_of(flux, tmp_path)
    objective.standardise_captions(["a fox"], start_there=True)
    assert torch.equal(objective.caption_loss.pooled_scale_E, torch.ones(objective.config.condition_pooled))
    assert objective.mapper.null_condition().isfinite().all()


def test_contrasts_teach_the_fact_that_differs() -> None:
    """The distance to the right caption falls below that to one with another time of day."""
    objective = new_objective(keeps_replay=True)
    objective.standardise_captions(["a fox", "an owl", "a bear in the snow"])
    examples = [
        dataclasses.replace(caption("a fox at night"), contrasts=[["a fox at sunset", "an owl at night"]]),
        dataclasses.replace(caption("a fox at sunset"), contrasts=[["a fox at night", "an owl at sunset"]]),
    ]
    weights = LossWeights(text=0.0, picture=0.0, caption=1.0, contrast=1.0)
    torch.manual_seed(0)
    first = objective(examples, weights)
    assert first["loss"].item() == pytest.approx(first["caption"].item() + first["contrast"].item(), rel=1e-5)
    optimizer = torch.optim.AdamW(objective.mapper.parameters(), lr=3e-3)
    for _ in range(60):
        losses = objective.replay(8, weights)
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
    assert losses["replayed contrast"].item() < 0.5 * first["contrast"].item()


def test_whitened_vokens_change_how_the_mapper_learns_and_not_what_it_does() -> None:
    objective = new_objective()
    states_PVH = torch.randn(40, 8, objective.config.hidden) * torch.linspace(0.1, 20, objective.config.hidden) + 3
    with torch.no_grad():
        before, null = objective.mapper(states_PVH), objective.mapper.null_condition()
        objective.whiten_vokens(states_PVH, torch.randn(40, 6, 16))
        torch.testing.assert_close(objective.mapper(states_PVH), before, atol=1e-4, rtol=1e-4)
        settled = objective.settle()
        torch.testing.assert_close(settled(states_PVH), before, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(settled.null_condition(), null, atol=1e-4, rtol=1e-4)
    assert settled.state_dict().keys() == objective.mapper.state_dict().keys()


def test_whitened_vokens_stand_out_where_they_go_with_the_conditions() -> None:
    objective = new_objective()
    hidden = objective.config.hidden
    states_PVH = torch.randn(400, 8, hidden) * torch.linspace(10, 20, hidden)
    states_PVH[..., 0] = torch.randn(400, 1) * 10  # the least of all, and the one that tells
    whitened: list[torch.Tensor] = []
    objective.whiten_vokens(states_PVH, states_PVH[:, :1, :1] * torch.randn(1, 6, 16))
    objective.mapper.fc[0].register_forward_pre_hook(lambda module, inputs: whitened.append(inputs[0]))
    with torch.no_grad():
        objective.mapper(states_PVH)
    spread_H = whitened[0].flatten(0, 1).std(dim=0)
    assert spread_H[0] > 2 * spread_H[1:].max()
