"""GILL's retrieval and decision, checked by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from minigpt5.errors import ModelFolderError
from minigpt5.evaluation.systems.gill import RetrievingDecoder
from minigpt5.evaluation.systems.retrieval import (
    FEATURES_WIDTH,
    INDEX,
    PictureIndex,
    Retrieval,
    load_retrieval,
    save_retrieval,
)
from minigpt5.model.weights import save_tensors
from minigpt5.storybook.captions import Facts, canonical_caption, facts_of_canonical
from minigpt5.types import DrawRequest, Vokens
from training.storybook.retrieve import agrees


def plain_retrieval() -> Retrieval:
    """Two vokens of one number each are the embedding, but for its length. A picture above a cosine of 0.9 is shown."""
    retrieval = Retrieval(2, 1, width=2)
    with torch.no_grad():
        retrieval.text.weight.copy_(torch.eye(2))
        retrieval.text.bias.zero_()
        retrieval.decide.weight.copy_(torch.tensor([[0.0, 0.0, 10.0]]))
        retrieval.decide.bias.fill_(-9.0)
    return retrieval


def index() -> PictureIndex:
    pictures = np.stack([np.full((4, 4, 3), shade, np.uint8) for shade in (0, 100, 200)])
    return PictureIndex(pictures, torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]))


def request(*states: float) -> DrawRequest:
    hidden_VH = np.array(states, np.float32)[:, None]
    return DrawRequest(vokens=Vokens(page=1, hidden_VH=hidden_VH, fingerprint=""), seed=0)


def test_the_nearest_picture_has_the_largest_cosine() -> None:
    texts_BW = plain_retrieval().embed_states(torch.tensor([[[3.0], [4.0]], [[-5.0], [0.0]]]))
    places_B, cosines_B = index().nearest(texts_BW)
    assert places_B.tolist() == [1, 2]
    assert cosines_B.tolist() == pytest.approx([0.8, 1.0])


def test_only_what_is_near_enough_is_retrieved() -> None:
    decoder = RetrievingDecoder(None, plain_retrieval(), index())  # type: ignore[arg-type]
    assert decoder.find(request(0.1, 9.0)) == 1
    assert decoder.find(request(3.0, 4.0)) is None, "a cosine of 0.8 is below the decision's 0.9"


def test_contrast_is_small_where_texts_are_at_their_pictures() -> None:
    retrieval, eye = plain_retrieval(), torch.eye(2)
    near, far = retrieval.contrast(eye, eye), retrieval.contrast(eye, eye.flip(0))
    scale = 1 / 0.07
    assert near.item() == pytest.approx(np.log1p(np.exp(-scale)), abs=1e-6)
    assert far.item() == pytest.approx(scale + np.log1p(np.exp(-scale)), rel=1e-5)


def test_saved_and_loaded(tmp_path: Path) -> None:
    retrieval = Retrieval(2, 1)
    embeddings_NW = torch.nn.functional.normalize(retrieval.picture(torch.randn(3, FEATURES_WIDTH)).detach(), dim=-1)
    save_retrieval(tmp_path, retrieval, PictureIndex(index().pictures_NYXC, embeddings_NW))
    again, found = load_retrieval(tmp_path, num_vokens=2, hidden=1)
    assert torch.equal(again.text.weight, retrieval.text.weight.half().float())
    assert torch.equal(found.embeddings_NW, embeddings_NW)
    assert (found.pictures_NYXC == index().pictures_NYXC).all()
    with pytest.raises(ModelFolderError, match="does not fit"):
        load_retrieval(tmp_path, num_vokens=3, hidden=1)
    save_tensors(
        {"pictures": torch.zeros(3, 4, 4, 3, dtype=torch.uint8), "embeddings": torch.ones(2, 256)}, tmp_path / INDEX
    )
    with pytest.raises(ModelFolderError, match="an embedding for each picture"):
        load_retrieval(tmp_path, num_vokens=2, hidden=1)
    (tmp_path / INDEX).unlink()
    with pytest.raises(ModelFolderError, match="make the folder again"):
        load_retrieval(tmp_path, num_vokens=2, hidden=1)


def test_a_picture_agrees_with_a_caption_that_says_less() -> None:
    shown = Facts(who="fox", what="house", side="left", place="snow", time="night")
    assert agrees(Facts(who="fox", side="left"), shown)
    assert agrees(Facts(), shown)
    assert not agrees(Facts(who="fox", side="right"), shown)


@pytest.mark.parametrize("who", ["fox", None])
@pytest.mark.parametrize("side", ["left", "right", None])
def test_canonical_captions_are_read_back(who: str | None, side: str | None) -> None:
    facts = Facts(who=who, what="house", side=side, place="snow", time=None)
    assert facts_of_canonical(canonical_caption(facts)) == facts
