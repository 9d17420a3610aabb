"""What takes long to import, once: a process that imports this forks a child for each command that it tries."""

from __future__ import annotations

import diffusers  # noqa: F401
import peft  # noqa: F401
import transformers

import minigpt5.model.decoders.load
import minigpt5.pipeline  # noqa: F401

# Both libraries import a class's module when it is asked for.
LAZY = (
    *(getattr(diffusers, name) for name in ("AutoencoderKL", "DDIMScheduler", "UNet2DConditionModel")),
    *(
        getattr(transformers, name)
        for name in ("AutoModelForCausalLM", "AutoTokenizer", "CLIPVisionModelWithProjection", "LlamaForCausalLM")
    ),
)
