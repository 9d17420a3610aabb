"""What the shipped model began as: base models, and fresh weights between them."""

from __future__ import annotations

import torch

from minigpt5.config import storybook
from minigpt5.model import folder as model_folder
from minigpt5.model.base_models import resolve
from minigpt5.model.language import LanguageModel
from minigpt5.model.mapper import Mapper
from training.weight_sources import WeightSources

SEED = 1


def make_start(sources: WeightSources) -> None:
    """Write the fresh model folder that stage "vision" starts from, unless it is there or a start is named."""
    folder = sources.runs / "start" / "model"
    if sources.start or (folder / "config.json").is_file():
        return
    torch.manual_seed(SEED)
    config = storybook()
    language = LanguageModel.from_base(resolve(config.language_model), config)
    language.initialise_vokens(seed=0)
    vision = model_folder.new_vision(config)
    model_folder.save(folder, config, language=language, mapper=Mapper(config), vision=vision)
