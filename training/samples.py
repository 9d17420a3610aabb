"""Samples of a model while it is trained, drawn with the weights as they are: sheets of pictures, and a story."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from transformers import DynamicCache

from minigpt5.engine.decoder import encode
from minigpt5.engine.denoising import denoise
from minigpt5.engine.prompts import Prompter
from minigpt5.engine.sampling import Choice, draw_token
from minigpt5.engine.steps import Asked, Read, Steps
from minigpt5.model.pixels import to_pixels
from minigpt5.objective.objective import Objective
from minigpt5.story.export.html import to_html
from minigpt5.story.state import StoryBuilder
from minigpt5.story.stream import page_seed
from minigpt5.types import GeneratorEvent, Picture, StoryRequest, Vokens

NUM_PAGES = 2


def save_sheet(path: Path, rows: list[Tensor]) -> None:
    """One PNG; each entry of `rows` is a row of pictures (n, 3, Y, X) in [-1, 1]."""
    lines = [torch.cat(list(row.cpu()), dim=2) for row in rows]
    width = max(line.shape[2] for line in lines)
    lines = [torch.nn.functional.pad(line, (0, width - line.shape[2]), value=1.0) for line in lines]
    Image.fromarray(to_pixels(torch.cat(lines, dim=1)[None].clamp(-1, 1))[0]).save(path)


@torch.no_grad()
def write_story(model: Objective, prompt: str, *, seed: int) -> bytes:
    """Write and draw a story of NUM_PAGES pages, as HTML, token by token in this process."""
    config, tokenizer, language = model.config, model.tokenizer, model.language
    request = StoryRequest(
        prompt=(prompt,), pages=NUM_PAGES, seed=seed, sampling=config.sampling, draw=config.default_draw
    )
    prompter = Prompter(config, tokenizer, engine=f"torch {torch.__version__}")
    events: list[GeneratorEvent] = []
    steps = Steps(
        prompter.writer(prompter.encode(request), events.append).script(),
        sampling=request.sampling,
        seed=seed,
        voken_embeddings=language.voken_embeddings,
        end_ids=prompter.end_ids,
    )
    answer_steps(steps.run(), model)
    builder = StoryBuilder(request, model=config.name)
    for event in events:
        builder.add(draw_picture(model, event, request) if isinstance(event, Vokens) else event)
    return to_html(builder.story()).encode()


def answer_steps(steps: Asked, model: Objective) -> None:
    """Answer steps from the live language model, with transformers' own cache."""
    cache, language = DynamicCache(), model.language
    answer: Tensor | Choice | None = None
    while True:
        try:
            asked = steps.send(answer)
        except StopIteration:
            return
        if isinstance(asked, Read):
            if surplus := language.num_read(cache) - asked.start:  # a stop string reaches back over some tokens
                cache.crop(-surplus)
            embeds_1SH = language.embed(torch.tensor([asked.ids], device=model.device))
            answer = language.states(embeds_1SH, cache=cache)[0, -asked.num_states :]
        else:
            logits_T = language.logits(asked.state_H[None])[0].float().cpu().numpy()
            answer = draw_token(logits_T, asked.draw, first_voken=language.voken_embeddings.first)


def draw_picture(model: Objective, vokens: Vokens, request: StoryRequest) -> Picture:
    """Draw the picture of a page's vokens."""
    mapper, seed = model.settle(), page_seed(request.seed, vokens.page)
    states_1VH = torch.from_numpy(vokens.hidden_VH)[None].to(model.device)
    pixels_1CYX = denoise(
        model.diffusion,
        mapper(states_1VH).float(),
        mapper.null_condition().float(),
        seeds=[seed],
        draw=request.draw,
        guidance_rescale=model.config.guidance_rescale,
    )
    return Picture(
        page=vokens.page,
        png=encode(pixels_1CYX, "PNG")[0],
        width=pixels_1CYX.shape[3],
        height=pixels_1CYX.shape[2],
        seed=seed,
        denoise_steps=request.draw.steps,
    )
