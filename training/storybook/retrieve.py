"""Stage "retrieve": GILL's retrieval and decision, on a model whose vokens are trained. It writes a whole system.

The decision learns whether the picture that the index would give shows all that the caption says. GILL had people say
which of both pictures they prefer; here the scenes' facts tell.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minigpt5.evaluation.frechet import EfficientNetFeatures
from minigpt5.evaluation.systems.folder import MODEL, write_system
from minigpt5.evaluation.systems.retrieval import PictureIndex, Retrieval, picture_features, save_retrieval
from minigpt5.model import folder as model_folder
from minigpt5.model.folder_config import load_config
from minigpt5.model.language import load_tokenizer, pad, padding_id
from minigpt5.model.locate import find_part
from minigpt5.model.prompt import text_ids
from minigpt5.objective.example import Example
from minigpt5.storybook.captions import Facts, facts_of_canonical
from minigpt5.storybook.scenes import draw_scene, scene_at
from training.data.batches import Batch, StageData
from training.stage import TeachesNoWriting
from training.storybook.presets import RetrievePreset
from training.weight_sources import WeightSources

SYSTEM = "gill"
INDEX_SEED = 271_828
"""Added to the seed of the examples: the index holds other scenes."""
LANGUAGE_BATCH = 32


class RetrieveObjective(nn.Module):
    """Contrasts captions with pictures, then learns the decision on what the index would give."""

    def __init__(
        self,
        retrieval: Retrieval,
        states_PVH: Tensor,
        features_PE: Tensor,
        index_features_NE: Tensor,
        agrees_PN: Tensor,
        *,
        decides_from: float,
    ) -> None:
        """`agrees_PN`: whether each picture of the index shows all that each caption says."""
        super().__init__()
        self.retrieval, self.decides_from = retrieval, decides_from
        self.states_PVH, self.features_PE = states_PVH, features_PE
        self.index_features_NE, self.agrees_PN = index_features_NE, agrees_PN
        retrieval.standardise(states_PVH, features_PE)

    def forward(self, batch: Batch[Example], progress: float) -> dict[str, Tensor]:
        places_B = torch.tensor([at % len(self.states_PVH) for at in batch.ids])
        texts_BW = self.retrieval.embed_states(self.states_PVH[places_B])
        losses = {
            "contrast": self.retrieval.contrast(texts_BW, self.retrieval.embed_features(self.features_PE[places_B]))
        }
        with torch.no_grad():
            index = PictureIndex(np.empty(0), self.retrieval.embed_features(self.index_features_NE))
            found_B, cosines_B = index.nearest(texts_BW)
            is_right_B = self.agrees_PN[places_B, found_B]
        logits_B = self.retrieval.decision(texts_BW.detach(), cosines_B)
        losses["decision"] = F.binary_cross_entropy_with_logits(logits_B, is_right_B.float())
        weight = float(progress >= self.decides_from)
        return {"loss": losses["contrast"] + weight * losses["decision"], **losses, "found": is_right_B.float().mean()}


class RetrieveStage(TeachesNoWriting):
    """A `Stage`."""

    def __init__(self, preset: RetrievePreset, sources: WeightSources, data: StageData) -> None:
        torch.manual_seed(preset.seed)
        self.preset, self.start = preset, sources.need_model(preset.stage)
        config = load_config(self.start)
        examples: list[Example] = [data.training.example_at(at)[1] for at in range(preset.num_pictures)]
        scenes = [scene_at(at, seed=preset.seed + INDEX_SEED) for at in range(preset.num_indexed)]
        self.pictures_NYXC = np.stack([draw_scene(scene) for scene in scenes])
        network = EfficientNetFeatures()
        features_PE = picture_features([example.drawn[0] for example in examples], network)
        said = [facts_of_canonical(example.captions[0]) for example in examples]
        shown = [Facts.of(scene) for scene in scenes]
        self.objective = RetrieveObjective(
            Retrieval(config.num_vokens, config.hidden),
            self._voken_states(examples),
            features_PE,
            picture_features(list(self.pictures_NYXC), network),
            torch.tensor([[agrees(one, other) for other in shown] for one in said]),
            decides_from=preset.decides_from,
        )

    @torch.no_grad()
    def _voken_states(self, examples: list[Example]) -> Tensor:
        """Voken states of bare captions, (P, V, H)."""
        config = load_config(self.start)
        language, _ = model_folder.load_language_and_vision(self.start, config, has_encoder=False)
        tokenizer = load_tokenizer(find_part(self.start, config, config.language_model), config)
        first = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        ids = [[*first, *text_ids(example.segments[0].text, tokenizer)] for example in examples]
        batches = (ids[start : start + LANGUAGE_BATCH] for start in range(0, len(ids), LANGUAGE_BATCH))
        return torch.cat([language.voken_states(*pad(batch, padding_id(tokenizer))) for batch in batches])

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [{"params": list(self.objective.parameters()), "lr": self.preset.optimizer.learning_rate}]

    def draw_sheet(self, path: Path) -> None:
        """None: retrieval draws nothing."""

    def saved_parameters(self) -> list[nn.Parameter]:
        return list(self.objective.parameters())

    @torch.no_grad()
    def save(self, folder: Path) -> None:
        """Write the system: the model it started from, the retrieval and the index."""
        shutil.copytree(self.start, folder / MODEL)
        retrieval = self.objective.retrieval
        embeddings_NW = retrieval.embed_features(self.objective.index_features_NE)
        save_retrieval(folder, retrieval, PictureIndex(self.pictures_NYXC, embeddings_NW))
        write_system(folder, SYSTEM, draw=load_config(self.start).draw)


def agrees(said: Facts, shown: Facts) -> bool:
    """Whether a picture shows every fact that a caption says."""
    return all(value in (None, vars(shown)[name]) for name, value in vars(said).items())
