"""The settings of a generator that writes with vLLM, and the replica that they ask Ray for."""

from __future__ import annotations

import os
import pickle
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from deployments.application import AppArgs
from deployments.engines.placement import place_generator
from minigpt5.engine.vllm.settings import VLLM_PYTHON, VllmSettings
from minigpt5.types import StoryRequest

ROOT = Path(__file__).parent.parent.parent.parent

EXPORT = {"folder": "/models/export", "python": "/opt/vllm/bin/python"}


def test_the_settings_under_vllm_are_those_of_its_dataclass() -> None:
    args = AppArgs(engine="vllm", vllm={**EXPORT, "tensor_parallel_size": 2})
    assert args.vllm_settings == VllmSettings(**EXPORT, tensor_parallel_size=2)  # type: ignore[arg-type]
    assert AppArgs().vllm_settings is None


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"engine": "vllm"}, "vllm.folder is not set: export the model with python -m minigpt5.engine.vllm.export"),
        ({"engine": "vllm", "vllm": {**EXPORT, "dtype": "half"}}, "unknown key 'dtype'"),
        ({"engine": "vllm", "vllm": {**EXPORT, "tensor_parallel_size": "two"}}, "tensor_parallel_size"),
        ({"vllm": EXPORT}, "but engine is torch: set engine=vllm, or leave it out"),
        ({"engine": "vllm", "vllm": EXPORT, "generator_precision": "int4"}, "precision of the exported folder"),
        ({"engine": "sglang"}, "'torch' or 'vllm'"),
    ],
)
def test_settings_that_do_not_fit_say_so(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        AppArgs(**given)


@pytest.mark.skipif(not os.access(VLLM_PYTHON, os.X_OK), reason="there is no .venv-vllm: make install-vllm")
def test_requests_and_vokens_cross_between_the_environments() -> None:
    """As Ray sends them: pickled, with the numpy of each side."""
    echo = (
        "import pickle, sys; request = pickle.load(sys.stdin.buffer); from minigpt5.types import Vokens; import numpy\n"
        "states = numpy.arange(6, dtype=numpy.float32).reshape(2, 3)\n"
        "vokens = Vokens(page=request.pages, hidden_VH=states, fingerprint=numpy.__version__)\n"
        "sys.stdout.buffer.write(pickle.dumps(vokens, protocol=5))"
    )
    sent = pickle.dumps(StoryRequest(prompt=("A fox",), pages=3), protocol=5)
    answer = subprocess.run([VLLM_PYTHON, "-c", echo], input=sent, cwd=ROOT, capture_output=True, check=True)
    vokens = pickle.loads(answer.stdout)
    assert vokens.page == 3 and (vokens.hidden_VH == np.arange(6).reshape(2, 3)).all()
    assert vokens.fingerprint != np.__version__


def test_a_replica_without_vllm_runs_in_its_own_environment() -> None:
    assert place_generator(0.7, 1, None) == {"ray_actor_options": {"num_cpus": 0.7, "num_gpus": 1}}


def test_a_replica_with_vllm_runs_in_the_environment_that_has_it() -> None:
    assert place_generator(0.7, 1, VllmSettings(**EXPORT))["ray_actor_options"] == {
        "num_cpus": 0.7,
        "num_gpus": 1,
        "runtime_env": {"py_executable": "/opt/vllm/bin/python"},
    }


def test_a_divided_model_has_a_bundle_for_each_gpu_on_one_node() -> None:
    options = place_generator(4, 1, VllmSettings(**EXPORT, tensor_parallel_size=2))
    assert options["placement_group_bundles"] == [{"CPU": 4}, {"GPU": 1.0}, {"GPU": 1.0}]
    assert options["placement_group_strategy"] == "STRICT_PACK" and options["ray_actor_options"]["num_gpus"] == 0
    assert "placement_group_bundles" not in place_generator(4, 0, VllmSettings(**EXPORT, tensor_parallel_size=2))
