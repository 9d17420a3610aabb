"""Sampling as it is handed to vLLM, whose settings are narrower than ours."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from minigpt5.engine.vllm.launch import new_params
from minigpt5.errors import InvalidRequest
from minigpt5.types import Sampling


@pytest.fixture(autouse=True)
def vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """What vLLM checks of its SamplingParams, in an environment without it."""

    def sampling_params(**given: Any) -> SimpleNamespace:
        if not 0 < given["top_p"] <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {given['top_p']}.")
        return SimpleNamespace(**given)

    modules = {"vllm": ModuleType("vllm"), "vllm.sampling_params": ModuleType("vllm.sampling_params")}
    vars(modules["vllm"])["SamplingParams"] = sampling_params
    vars(modules["vllm.sampling_params"])["RequestOutputKind"] = SimpleNamespace(DELTA="delta")
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(temperature=0.7, top_p=0.0, repetition_penalty=1.2), (0.0, 1.0, 1.2)),
        (Sampling(temperature=0.7, top_p=0.5), (0.7, 0.5, 1.0)),
        (Sampling(temperature=0.0, top_p=0.5), (0.0, 0.5, 1.0)),
    ],
)
def test_a_top_p_of_zero_is_greedy_and_others_are_kept(sampling: Sampling, expected: tuple[float, ...]) -> None:
    params = new_params(sampling, max_tokens=4)
    assert (params.temperature, params.top_p, params.repetition_penalty) == expected


def test_what_vllm_refuses_is_an_invalid_request() -> None:
    with pytest.raises(InvalidRequest, match=r"vLLM refuses these settings: top_p must be in \(0, 1\]"):
        new_params(Sampling(top_p=7.0), max_tokens=4)
