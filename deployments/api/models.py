"""The model that is served: its defaults, what it is for, and examples to try."""

from __future__ import annotations

from urllib.parse import quote

from fastapi import APIRouter, Depends
from fastapi.responses import Response

from deployments.api.errors import ApiError, document
from deployments.api.front import Front, FrontOf, refuse_unknown_query
from deployments.api.openai_body import check_model
from deployments.api.paths import public_path
from deployments.schemas import CreateStory, Defaults, ExampleReply, ModelList, ModelReply, shown
from minigpt5.types import MAX_CHARACTERS

models = APIRouter(dependencies=[Depends(refuse_unknown_query)])


@models.get("/v1/models", response_model=ModelList)
async def list_models(front: FrontOf) -> ModelList:
    """The model that is served, what it is for, and the defaults of a request's optional fields."""
    return ModelList(data=[_model_reply(front)])


@models.get(
    "/v1/models/{model_id:path}/examples/{number:int}.webp",
    response_class=Response,
    responses=document("image/webp", "A picture"),
)
async def get_example_picture(model_id: str, number: int, front: FrontOf) -> Response:
    """The small picture of one of the model's examples, from 1."""
    check_model(model_id, front.config.name)
    if number not in front.example_pictures:
        raise ApiError(404, f"example {number} of {shown(model_id)} has no picture", code="not_found")
    return Response(front.example_pictures[number], media_type="image/webp", headers={"Cache-Control": "no-cache"})


@models.get("/v1/models/{model_id:path}", response_model=ModelReply)
async def get_model(model_id: str, front: FrontOf) -> ModelReply:
    """The same of the model by its name."""
    check_model(model_id, front.config.name)
    return _model_reply(front)


def _model_reply(front: Front) -> ModelReply:
    config = front.config
    pictures = public_path(f"/v1/models/{quote(config.name)}/examples")
    return ModelReply(
        id=config.name,
        about=config.about,
        examples=[
            ExampleReply(prompt=prompt, picture=f"{pictures}/{n}.webp" if n in front.example_pictures else None)
            for n, prompt in enumerate(config.examples, start=1)
        ],
        fingerprint=config.fingerprint,
        image_size=f"{config.drawn_px}x{config.drawn_px}",
        context_tokens=config.context_tokens,
        max_pixels=config.max_drawn_pixels,
        size_multiple=config.size_multiple * config.upscale,
        schedulers=list(config.samplers),
        styles=list(config.styles),
        max_characters=MAX_CHARACTERS if config.has_ip_adapter else 0,
        defaults=Defaults(
            pages=CreateStory.model_fields["pages"].default,
            steps=config.default_draw.steps,
            guidance_scale=config.default_draw.guidance_scale,
            scheduler=config.default_draw.scheduler,
            style=config.default_draw.style,
            consistency=config.consistency_of(None),
            temperature=config.sampling.temperature,
            top_p=config.sampling.top_p,
            min_page_tokens=config.sampling.min_page_tokens,
            max_page_tokens=config.sampling.max_page_tokens,
        ),
    )
