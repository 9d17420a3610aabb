"""Metrics by CLIP, with a tiny random model of the real class, against torchmetrics and written-out formulas."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torchmetrics.multimodal.clip_score import CLIPScore
from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from examples.own_model.tiny_bases import clip_text_config, make_clip_tokenizer
from minigpt5.errors import BaseModelNotFound, InvalidRequest, ModelFolderError
from minigpt5.evaluation.alignment import (
    Clip,
    Turn,
    clip_f1_published,
    clip_i,
    clip_score,
    clip_t,
    gill_vist,
    mm_relevance,
)
from minigpt5.evaluation.perceptual import Lpips

TEXTS = ["a fox", "a red balloon over the sea", "x" * 200]


def noise(num: int, *, seed: int, px: int = 40) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).integers(0, 256, (num, px, px + 8, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
    )
    config = CLIPConfig(text_config=clip_text_config().to_dict(), vision_config=vision.to_dict(), projection_dim=16)
    CLIPModel(config).save_pretrained(path)
    make_clip_tokenizer().save_pretrained(path)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def clip(folder: Path) -> Clip:
    return Clip(str(folder), batch_size=2)


def of_torchmetrics(clip: Clip) -> CLIPScore:
    """CLIPScore with the same weights; of a processor it wants one call for both."""

    class Features(torch.nn.Module):
        """get_image_features and get_text_features as tensors, which transformers 5 wraps."""

        def __init__(self) -> None:
            super().__init__()
            self.clip, self.config = clip.model, clip.model.config

        def get_image_features(self, pixels: torch.Tensor) -> torch.Tensor:
            return self.clip.get_image_features(pixels).pooler_output

        def get_text_features(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return self.clip.get_text_features(ids, mask).pooler_output

    def process(*, text: list[str] | None = None, images: list[torch.Tensor] | None = None, **options: object):  # type: ignore[no-untyped-def]
        if text is not None:
            return clip.tokenizer(text, truncation=True, **options)
        return clip.image_processor([one.permute(1, 2, 0).numpy() for one in images or []], return_tensors="pt")

    return CLIPScore(model_name_or_path=lambda: (Features(), process))


def to_tensors(pictures: list[np.ndarray]) -> list[torch.Tensor]:
    return [torch.from_numpy(one).permute(2, 0, 1) for one in pictures]


def test_clip_i_and_clip_t_are_torchmetrics_clip_score(clip: Clip) -> None:
    drawn, true = noise(3, seed=1), noise(3, seed=2)
    library = of_torchmetrics(clip)
    library.update(to_tensors(drawn), to_tensors(true))
    assert clip_score(clip_i(drawn, true, clip)) == pytest.approx(float(library.compute()), abs=1e-3)
    library.reset()
    library.update(to_tensors(drawn), TEXTS)
    with_captions = clip_t(drawn, TEXTS, clip)
    assert 100 * with_captions.mean() == pytest.approx(float(library.score / library.n_samples), abs=1e-3)
    assert clip_score(with_captions) == pytest.approx(float(library.compute()), abs=1e-3)


def test_a_picture_is_its_own_nearest(clip: Clip) -> None:
    drawn = noise(3, seed=1)
    assert clip_i(drawn, drawn, clip) == pytest.approx(np.ones(3), abs=1e-6)
    assert (clip_i(drawn, drawn[::-1], clip)[[0, 2]] < 1).all()


def test_clip_score_is_never_below_zero() -> None:
    assert clip_score(np.array([0.2, 0.4])) == pytest.approx(30)
    assert clip_score(np.array([-0.2, 0.1])) == 0


def test_mm_relevance_pairs_by_position_a_text_with_a_picture_too(clip: Clip) -> None:
    """As the demonstration in compute_mmrel.py: ["Hi", picture] with [picture, "Hello World!"]."""
    picture, other = noise(2, seed=4)
    found = mm_relevance(["Hi", picture], [other, "Hello World!", "more"], clip)
    texts, pictures = clip.embed_texts(["Hi", "Hello World!"]), clip.embed_pictures([other, picture])
    scale = float(clip.model.logit_scale.exp())
    assert found == pytest.approx(((texts * pictures).sum(-1) * scale).tolist(), abs=1e-4)


def test_published_clip_f1_counts_missing_and_superfluous_items(clip: Clip) -> None:
    """Three texts and one picture are due. The third text is missing and a picture is superfluous."""
    one, two, three = noise(3, seed=5)
    replies = [Turn("a", one), Turn("b", two), Turn("")]
    references = [Turn("c", three), Turn("d"), Turn("e")]
    total = float(
        clip.embed("a") @ clip.embed("c") + clip.embed("b") @ clip.embed("d") + clip.embed(one) @ clip.embed(three)
    )
    precision, recall = total / 4, total / 4
    assert clip_f1_published(replies, references, clip) == pytest.approx(
        2 * precision * recall / (precision + recall), abs=1e-5
    )
    same = clip_f1_published(references, references, clip)
    assert same == pytest.approx(1, abs=1e-6)
    assert clip_f1_published([Turn("a")], [Turn("", one)], clip) == 0


def test_gill_scores_last_pictures_at_256_px(clip: Clip) -> None:
    drawn, true = noise(2, seed=6), noise(2, seed=7)
    lpips = Lpips()
    found = gill_vist(drawn, true, clip, lpips)
    assert found["clip_i"] == pytest.approx(clip_i(drawn, true, clip).mean())
    from minigpt5.model.pixels import to_tensor

    pairs = [
        [
            torch.nn.functional.interpolate(to_tensor(p[None]), size=(256, 256), mode="bilinear", antialias=True)
            for p in pair
        ]
        for pair in zip(drawn, true, strict=True)
    ]
    assert found["lpips"] == pytest.approx(np.mean([float(lpips(*pair)) for pair in pairs]))
    assert gill_vist(drawn, drawn, None, lpips) == {"lpips": 0}


def test_errors_name_what_is_missing(clip: Clip, tmp_path: Path) -> None:
    with pytest.raises(BaseModelNotFound, match="no-such-clip"):
        Clip("no-such-clip")
    with pytest.raises(ModelFolderError, match="is a bert model: give a CLIP model"):
        Clip("minilm-l6")
    with pytest.raises(InvalidRequest, match="1 predictions and 2 references"):
        clip_t(noise(1, seed=1), ["a", "b"], clip)
