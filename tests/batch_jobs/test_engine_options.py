"""What a job's options say of its engines reaches them, and is part of what makes the job this job."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from batch_jobs import describe, illustrate, redraw
from batch_jobs.job import decoder_pool, generator_pool, precisions
from batch_jobs.state import JobState
from minigpt5.config import default_model_folder
from minigpt5.engine.decoder import DiffusionDecoder
from minigpt5.engine.generator import VokenGenerator
from minigpt5.errors import MiniGPT5Error
from minigpt5.model.quantised_linear import Bfloat16Linear

MODEL = str(default_model_folder())
CHOSEN = ["--generator-precision", "bfloat16", "--decoder-precision", "bfloat16", "--decoder-backend", "eager"]


def test_engines_compute_in_the_precision_that_is_asked_for() -> None:
    options = illustrate.make_parser().parse_args(["x.jsonl", "--output", "y", *CHOSEN])
    generator, decoder = generator_pool(options, MODEL).load(), decoder_pool(options, MODEL).load()
    assert isinstance(generator, VokenGenerator) and isinstance(decoder, DiffusionDecoder)
    assert any(isinstance(layer, Bfloat16Linear) for layer in generator.language.body.modules())
    assert {one.dtype for one in decoder.diffusion.denoiser.parameters()} == {torch.bfloat16}
    assert decoder.diffusion.stand_ins == {}, "torch draws, and no backend"


def test_a_job_goes_on_in_its_own_precision_alone(tmp_path: Path) -> None:
    parser = illustrate.make_parser()
    plain, chosen = (parser.parse_args(["x.jsonl", "--output", "y", *words]) for words in ([], CHOSEN))
    assert precisions(plain) == {}, "a job of before has no precision in its plan"
    assert precisions(chosen) == {"generator_precision": "bfloat16", "decoder_precision": "bfloat16"}
    state = JobState(str(tmp_path / "out"))
    state.take({"job": "illustrate", **precisions(plain)})
    state.release()
    with pytest.raises(MiniGPT5Error, match="generator_precision is 'bfloat16' but was None"):
        state.is_finished({"job": "illustrate", **precisions(chosen)})
    assert precisions(describe.make_parser().parse_args(["x", "--output", "y", *CHOSEN[:2]])) == {
        "generator_precision": "bfloat16"
    }
    assert precisions(redraw.make_parser().parse_args(["x", "--output", "y", *CHOSEN[2:]])) == {
        "decoder_precision": "bfloat16"
    }


def test_a_precision_that_no_engine_has_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        illustrate.make_parser().parse_args(["x.jsonl", "--output", "y", "--decoder-precision", "int8"])
    assert "'int8' (choose from" in capsys.readouterr().err
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "A fox"}))
    words = [str(tmp_path / "rows.jsonl"), "--output", str(tmp_path / "out"), "--vllm", str(tmp_path)]
    assert illustrate.main([*words, "--generator-precision", "float32"]) == 2
    assert "vLLM computes in the precision of the exported folder: leave it out" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
