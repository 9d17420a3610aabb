"""Distances of sets of pictures: against the formulas, with a small network read from a file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from minigpt5.errors import BaseModelNotFound, InvalidRequest, ModelFolderError
from minigpt5.evaluation.frechet import (
    EfficientNetFeatures,
    Graph,
    efficientnet_distance,
    extract,
    fid,
    frechet_distance,
    inception_score,
    story_fid_published,
)
from minigpt5.model.backends.openvino import import_openvino
from minigpt5.storybook.scenes import draw_scene, scene_at

PX = 16


class Small(nn.Module):
    """Stands for Inception-v3 in size alone: 5 features and 7 logits of a picture's bytes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.convolution = nn.Conv2d(3, 5, 3)
        self.classes = nn.Linear(5, 7, bias=False)

    def forward(self, pictures_BCYX: Tensor) -> tuple[Tensor, Tensor]:
        features_BD = self.convolution(pictures_BCYX.float() / 128 - 1).relu().mean(dim=(2, 3))
        return features_BD, 20 * self.classes(features_BD)


def noise(num: int, *, seed: int, high: int = 256, px: int = PX) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).integers(0, high, (num, px, px, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def graph_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    openvino = import_openvino()
    path = tmp_path_factory.mktemp("graph") / "small.xml"
    example = torch.zeros(2, 3, PX, PX, dtype=torch.uint8)
    with torch.no_grad():
        converted = openvino.convert_model(Small().eval(), example_input=example, input=[-1, 3, -1, -1])
    openvino.save_model(converted, path, compress_to_fp16=False)
    return path


def by_hand(one_BD: np.ndarray, other_BD: np.ndarray) -> float:
    """The formula with symmetric roots: trace((S cov' S)^1/2), S the root of cov."""

    def root(matrix: np.ndarray) -> np.ndarray:
        values, vectors = np.linalg.eigh(matrix)
        return (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T

    cov, other_cov = (np.cov(features, rowvar=False) for features in (one_BD, other_BD))
    mixed = root(root(cov) @ other_cov @ root(cov))
    means = one_BD.mean(0) - other_BD.mean(0)
    return float(means @ means + np.trace(cov + other_cov - 2 * mixed))


def test_distance_is_the_formula_of_frechet() -> None:
    rng = np.random.default_rng(1)
    one, other = rng.normal(size=(40, 4)), rng.normal(0.5, 2, size=(30, 4)) @ rng.normal(size=(4, 4))
    found = frechet_distance(torch.from_numpy(one), torch.from_numpy(other))
    assert found == pytest.approx(by_hand(one, other), rel=1e-9)


def test_distance_of_a_shift_is_its_square_and_of_the_same_set_is_zero() -> None:
    features_BD = torch.from_numpy(np.random.default_rng(2).normal(size=(50, 3)))
    assert frechet_distance(features_BD, features_BD + 2) == pytest.approx(3 * 4)
    assert frechet_distance(features_BD, features_BD) == pytest.approx(0, abs=1e-9)


def test_fid_reads_a_network_from_a_file(graph_file: Path) -> None:
    drawn, true = noise(20, seed=3, high=128), noise(24, seed=4)
    with torch.no_grad():
        features = [Small()(torch.from_numpy(np.stack(one)).permute(0, 3, 1, 2))[0].numpy() for one in (drawn, true)]
    network = Graph(graph_file)
    assert network.num_features == 5
    assert fid(drawn, true, network, px=None) == pytest.approx(by_hand(*features), rel=1e-3)


def test_pictures_of_two_sizes_need_one_to_be_brought_to(graph_file: Path) -> None:
    network, both = Graph(graph_file), [*noise(1, seed=5), *noise(1, seed=5, px=24)]
    assert extract(both, network, px=PX).shape == (2, 5)
    with pytest.raises(InvalidRequest, match=r"16, 16.*24, 24.*give px"):
        extract(both, network)


def test_stories_fid_is_the_mean_over_stories(graph_file: Path) -> None:
    network = Graph(graph_file)
    drawn, true = ([noise(3, seed=s), noise(1, seed=s + 1), noise(5, seed=s + 2)] for s in (10, 20))
    expected = (fid(drawn[0], true[0], network) + fid(drawn[2], true[2], network)) / 2
    assert story_fid_published(drawn, true, network) == pytest.approx(expected)
    with pytest.raises(InvalidRequest, match="none of 1 stories"):
        story_fid_published(drawn[1:2], true[1:2], network)


def test_inception_score_is_the_exponential_of_the_mean_divergence(graph_file: Path) -> None:
    """In parts of one picture it is 1; otherwise as the formula has it, part by part in torchmetrics' order."""
    drawn, network = noise(6, seed=6), Graph(graph_file, output=1)
    torch.manual_seed(9)
    order = torch.randperm(6)
    torch.manual_seed(9)
    mean, std = inception_score(drawn, network, splits=2)
    probabilities = extract(drawn, network)[order].double().softmax(1).numpy()
    parts = [
        np.exp((part * np.log(part / part.mean(0))).sum(1).mean()) for part in (probabilities[:3], probabilities[3:])
    ]
    assert (mean, std) == pytest.approx((np.mean(parts), np.std(parts, ddof=1)), abs=1e-4)
    assert inception_score(drawn, network, splits=6)[0] == pytest.approx(1)


def test_what_cannot_be_measured_is_refused(graph_file: Path, tmp_path: Path) -> None:
    network = Graph(graph_file)
    with pytest.raises(InvalidRequest, match="2 and 1 pictures"):
        fid(noise(1, seed=1), noise(2, seed=1), network)
    with pytest.raises(InvalidRequest, match="3 pictures in 10 parts"):
        inception_score(noise(3, seed=1), network)
    with pytest.raises(InvalidRequest, match="there are no pictures"):
        extract([], network)
    with pytest.raises(ModelFolderError, match="has 2 outputs, output 2"):
        Graph(graph_file, output=2)
    with pytest.raises(BaseModelNotFound, match=r"no file .*docs/evaluation\.md"):
        Graph(tmp_path / "inception.onnx")
    (tmp_path / "inception.onnx").write_bytes(b"no graph")
    with pytest.raises(ModelFolderError, match="cannot be read as ONNX or OpenVINO"):
        Graph(tmp_path / "inception.onnx")


def test_efficientnets_features_are_those_of_its_library() -> None:
    pictures = [draw_scene(scene_at(index, seed=3, split="validation")) for index in range(2)]
    features = EfficientNetFeatures()
    found_BD = extract(pictures, features)
    assert found_BD.shape == (2, 1280)
    network = features.encoder.network
    with torch.no_grad():
        ready = features.encoder.prepare(torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float())
        expected_BD = network._avg_pooling(network.extract_features(ready)).flatten(1)
    assert torch.allclose(found_BD, expected_BD, atol=1e-5)


def test_efficientnets_distance_grows_with_the_difference() -> None:
    """The features of 4 pictures have rank 3: the distance to the same pictures is 0 but for rounding."""

    class FirstFew(nn.Module):  # 1280 x 1280 roots take seconds
        num_features = 8

        def __init__(self) -> None:
            super().__init__()
            self.features = EfficientNetFeatures()

        def forward(self, pictures_BCYX: Tensor) -> Tensor:
            return self.features(pictures_BCYX)[:, :8]

    pictures = [draw_scene(scene_at(index, seed=3, split="validation")) for index in range(4)]
    darker = [one // 4 for one in pictures]
    network = FirstFew()
    assert efficientnet_distance(pictures, pictures, network) == pytest.approx(0, abs=1e-4)
    assert efficientnet_distance(darker, pictures, network) > 0.01
