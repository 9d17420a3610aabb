"""What a training worker holds and how long a step takes, with a model of base models whose language model has 0.5 GB:
the part `memory` of benchmarks.training.

Workers are processes of this machine that talk through gloo. Each loads the model folder, makes three steps of the
stage "align" and saves. Memory is read from the kernel 50 times a second, and counted over that of the process after
it has done the same with a tiny model. A page that several processes map counts in equal parts in each (Pss), from the
second step on: before it one worker may have read what another has not, and has all of the page. What a worker holds
alone is counted apart, and throughout.
"""

from __future__ import annotations

import json
import statistics
import threading
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from batch_jobs.prepare import Part, write_part
from examples.own_model.tiny_bases import make_qwen3, make_stable_diffusion, make_tokenizer
from tests.helpers.ranks import run_ranks
from training.report import read_lines
from training.run_folder import RunFolder

SAMPLE_S = 0.02
HIDDEN, NUM_LAYERS = 1024, 17
SETTINGS = [
    "steps=3",
    "log_every=1",
    "per_gpu_batch_size=1",
    "gradient_accumulation_steps=1",
    "validation_batches=0",
    "draws_samples=false",
    "checkpoint_every_s=1000000",
    "num_threads=1",
]
HALVED = ["bf16=true", "frozen_bf16=true"]
LIVE_PARAMETERS = 32_000_000
WAYS = {
    "bfloat16, mapped": HALVED,
    "bfloat16, mapped, ZeRO 3": [*HALVED, "zero_stage=3", f"zero_live_parameters={LIVE_PARAMETERS}"],
    **{f"bfloat16, mapped, ZeRO {stage}": [*HALVED, f"zero_stage={stage}"] for stage in (0, 1, 2)},
    "float32": ["bf16=false"],
}
WITH_FOUR = ("float32", "bfloat16, mapped", "bfloat16, mapped, ZeRO 3")
"""Ways that are measured with four workers too."""


@dataclass
class Memory:
    """Bytes of a process."""

    proportional: int
    """Its own pages, and its part of those that it shares."""
    private: int
    """Pages that no other process can share: those that no file backs."""


def read_memory() -> Memory:
    """This process's memory, as the kernel counts it."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    kib = {name: int(value) for name, value, *_ in (line.replace(":", " ").split() for line in lines)}
    return Memory(proportional=1024 * kib["Pss"], private=1024 * kib["Anonymous"])


class PeakMemory:
    """The most memory of this process within a context, over that at its start; of pages that it shares, since
    `count_shared`."""

    def __enter__(self) -> PeakMemory:
        self._before, self.peak, self._is_done = read_memory(), Memory(0, 0), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._is_done.wait(SAMPLE_S):
            now = read_memory()
            self.peak.proportional = max(self.peak.proportional, now.proportional - self._before.proportional)
            self.peak.private = max(self.peak.private, now.private - self._before.private)

    def count_shared(self) -> None:
        self.peak.proportional = 0

    def __exit__(self, *_: object) -> None:
        self._is_done.set()
        self._thread.join()


WORKER = """
import json, sys
from pathlib import Path
import torch
from torch import distributed
import training.stages.voken
from benchmarks.training_memory import PeakMemory
from training import devices, loop, zero
from training.data.batches import local_batches
from training.presets import PUBLISHED, for_workers, override
from training.run_folder import RunFolder
from training.stage import build_stage
from training.train import find_examples
from training.weight_sources import WeightSources

model, warm, rows, out, *settings = sys.argv[1:]
torch.set_num_threads(1)
distributed.init_process_group("gloo")

def train(start, out, settings, at_second_step):
    sources = WeightSources(runs=Path(out), start=start)
    preset = for_workers(override(PUBLISHED["align"], settings), distributed.get_world_size())
    preset, data = find_examples(preset, sources, rows)
    preset = devices.for_device(preset, loop.CPU)
    # Each worker takes whole batches of one example here: who learns from which is no matter of memory.
    one = override(preset, ["batch_size=1"])
    batches = local_batches(data.training, one)

    def followed(step):
        for number, batch in enumerate(batches(step)):
            if number == 1:
                distributed.barrier()
                at_second_step()
            yield batch

    stage = build_stage(preset, sources, data)
    loop.fit(stage, preset, RunFolder(out), followed)
    distributed.barrier()  # the first worker saves, and none lets the mapped pages go before

train(warm, out + "-warm", [setting for setting in settings if not setting.startswith("zero")], lambda: None)
distributed.barrier()
with PeakMemory() as memory:
    train(model, out, settings, memory.count_shared)
print("PEAK", json.dumps(vars(memory.peak)))
"""


@dataclass(frozen=True)
class Made:
    """What workers train on."""

    model: Path
    """A model folder whose language model has 0.5 GB of random weights, stored in bfloat16."""
    warm: Path
    """One whose language model is tiny."""
    rows: Path
    """Captions with pictures."""


def make_model(folder: Path) -> Made:
    """Make both models, in `model` and `warm`, from the base models in `language`, `tiny` and `diffusion`."""
    from minigpt5 import new

    language, tiny, diffusion = (folder / name for name in ("language", "tiny", "diffusion"))
    made = Made(folder / "model", folder / "warm", folder / "rows")
    tokenizer = make_tokenizer(language)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        intermediate_size=4 * HIDDEN,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    Qwen3ForCausalLM(config).bfloat16().save_pretrained(language)
    make_stable_diffusion(diffusion)
    make_qwen3(tiny)
    for model, base in ((made.model, language), (made.warm, tiny)):
        new.make_folder(model, language=str(base), diffusion=str(diffusion), context_tokens=512)
    part = Part(number=0, file="", start=0, count=64)
    write_part(part, layout="storybook:caption", uri="", output=str(made.rows), seed=3)
    return made


def run_workers(made: Made, out: Path, settings: list[str], *, num_workers: int) -> list[Memory]:
    """The peak of each worker of one run."""
    arguments = [str(made.model), str(made.warm), str(made.rows), str(out), *SETTINGS, *settings]
    outputs = run_ranks(WORKER, arguments, num=num_workers)
    said = [next(line for line in output.splitlines() if line.startswith("PEAK")) for output in outputs]
    return [Memory(**json.loads(line[4:])) for line in said]


def measure(made: Made, out: Path, way: str, *, num_workers: int) -> dict[str, float]:
    """Mean peaks of a way's workers in MiB, and the seconds of a step after the first."""
    peaks = run_workers(made, out, WAYS[way], num_workers=num_workers)
    lines = read_lines(RunFolder(str(out)))
    at_s = [line["elapsed_s"] for line in lines if "loss" in line]
    return {
        "step_s": (at_s[-1] - at_s[0]) / (len(at_s) - 1),
        "peak_mib": statistics.fmean(one.proportional for one in peaks) / 2**20,
        "private_mib": statistics.fmean(one.private for one in peaks) / 2**20,
    }
