"""What is exported for vLLM: the final norm, the check, and folders that are refused."""

from __future__ import annotations

import dataclasses
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from minigpt5.engine.vllm.export import export, read_norm
from minigpt5.engine.vllm.exported import Export, Exported, FinalNorm, load_export
from minigpt5.engine.vllm.settings import VllmSettings
from minigpt5.errors import ModelFolderError, SettingsError
from tests.helpers.tiny import tiny_config

CONFIG = tiny_config()


def new_export(**changes: Any) -> Export:
    about = Exported(
        fingerprint=CONFIG.fingerprint, dtype="float32", num_layers=2, norm="rms", eps=1e-5, check_ids=(1, 2, 3)
    )
    norm = FinalNorm(
        kind="rms", eps=1e-5, weight_H=np.ones(CONFIG.hidden, np.float32), bias_H=np.zeros(CONFIG.hidden, np.float32)
    )
    check_VH = np.ones((CONFIG.num_vokens, CONFIG.hidden), np.float32)
    return dataclasses.replace(Export(about=about, norm=norm, check_VH=check_VH), **changes)


@pytest.mark.parametrize("kind", [LlamaRMSNorm, Gemma2RMSNorm, nn.LayerNorm])
def test_the_final_norm_is_the_models_own(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    module = kind(16)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    norm = read_norm(types.SimpleNamespace(body=types.SimpleNamespace(norm=module)))  # type: ignore[arg-type]
    states_NH = torch.randn(5, 16) * 7
    assert np.allclose(norm(states_NH.numpy()), module(states_NH).detach().numpy(), atol=1e-4)


def test_another_norm_is_refused() -> None:
    class Tripled(LlamaRMSNorm):
        def forward(self, states: torch.Tensor) -> torch.Tensor:
            return 3 * super().forward(states)

    with pytest.raises(ModelFolderError, match="neither an RMS norm nor a layer norm: use engine=torch"):
        read_norm(types.SimpleNamespace(body=types.SimpleNamespace(norm=Tripled(16))))  # type: ignore[arg-type]


def test_an_export_is_read_as_it_was_written(tmp_path: Path) -> None:
    new_export().save(tmp_path)
    found = load_export(tmp_path, CONFIG)
    assert found.about == new_export().about and (found.check_VH == 1).all()


def test_a_folder_that_is_no_export_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(ModelFolderError, match="python -m minigpt5.engine.vllm.export MODEL FOLDER"):
        load_export(tmp_path, CONFIG)


def test_the_export_of_another_model_is_refused(tmp_path: Path) -> None:
    new_export().save(tmp_path)
    with pytest.raises(ModelFolderError, match="was exported of model ffffffffffff but tiny is eeeeeeeeeeee"):
        load_export(tmp_path, dataclasses.replace(CONFIG, fingerprint="e" * 64))


def test_a_damaged_export_is_refused(tmp_path: Path) -> None:
    new_export().save(tmp_path)
    path = tmp_path / "minigpt5" / "states.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ModelFolderError, match="is damaged .* export the model again"):
        load_export(tmp_path, CONFIG)


def test_a_check_of_another_shape_is_refused(tmp_path: Path) -> None:
    new_export(check_VH=np.ones((3, 3), np.float32)).save(tmp_path)
    with pytest.raises(ModelFolderError, match=r"a check of shape \(3, 3\): export the model again"):
        load_export(tmp_path, CONFIG)


def test_a_folder_with_something_in_it_is_not_written_to(tmp_path: Path) -> None:
    (tmp_path / "mine").touch()
    with pytest.raises(ModelFolderError, match="is not empty: name another folder"):
        export("models/storybook", tmp_path)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"folder": ""}, "vllm.folder is not set: export the model"),
        ({"tensor_parallel_size": 0}, "vllm.tensor_parallel_size is 0 but must be 1 or more"),
        ({"gpu_memory_utilization": 1.5}, "vllm.gpu_memory_utilization is 1.5 but must be from 0 to 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        VllmSettings(**{"folder": "export", **given})
