"""The precision that the language model computes in on a CPU, where nobody names one: the fastest that keeps its text.

The base model's own 4-bit weights keep it, where its folder has them, and float32 does. Which is faster depends on the
machine's instructions, so both are timed once on a matrix of the model's size, and the answer is kept in the cache.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor, nn

from minigpt5.errors import MiniGPT5Error, ModelFolderError
from minigpt5.model.cache import keep_in_cache
from minigpt5.model.libraries import load_base_config
from minigpt5.model.quantised import GROUP, Codes, has_codes
from minigpt5.model.quantised_linear import OUTPUT_MULTIPLE, Int4Linear, can_multiply_int8, make_float32
from minigpt5.types import TextPrecision

MEASURED_WEIGHTS = 2**23
"""Of all matrices of a measurement together: more than caches near a core hold."""
ROWS = (1, 4)
REPEATS = 12
"""In turns; the best one counts. What else runs on the machine only adds to a time, and may stay for long."""
MIN_GAIN = 1.2
"""Times that int4 is faster than float32 before it is chosen: less is within a measurement's noise."""
FILE = "precision.json"
CPU_FIELDS = ("model name", "cpu family", "model", "stepping", "flags")


def choose_precision(base_folder: Path, *, num_threads: int | None = None) -> TextPrecision:
    """The fastest precision on this machine that keeps the text of a base model.

    `num_threads`: torch threads of the engine, by default as many as here. A measurement says its answer on stderr.
    """
    if not has_codes(base_folder):
        return "float32"
    num_threads = num_threads or torch.get_num_threads()
    config = load_base_config(base_folder).get_text_config()
    shape = _round_up(config.intermediate_size, OUTPUT_MULTIPLE), _round_up(config.hidden_size, GROUP)
    machine = [platform.machine(), *_cpu(), torch.backends.cpu.get_cpu_capability(), os.cpu_count()]
    key = json.dumps([*machine, torch.__version__, num_threads, *shape])
    name = f"precisions/{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    measured: dict[TextPrecision, float] = {}

    def fill(folder: Path) -> None:
        measured.update(measure_precisions(*shape, num_threads=num_threads))
        (folder / FILE).write_text(json.dumps(measured, indent=2) + "\n")

    trouble = ""
    try:
        found: dict[TextPrecision, float] = json.loads((keep_in_cache(name, fill) / FILE).read_text())
    except MiniGPT5Error as error:  # a cache that cannot be written costs time alone
        trouble = f"; every start measures this: {error}"
        found = measured = measured or measure_precisions(*shape, num_threads=num_threads)
    chosen: TextPrecision = "int4" if found["int4"] * MIN_GAIN <= found["float32"] else "float32"
    if measured:
        times = ", ".join(f"{precision} {found[precision]:.3f} ms" for precision in ("float32", "int4"))
        print(f"minigpt5: text is computed in {chosen} ({times}, threads: {num_threads}){trouble}", file=sys.stderr)
    return chosen


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def measure_precisions(
    num_outputs: int, num_inputs: int, *, num_threads: int | None = None
) -> dict[TextPrecision, float]:
    """Milliseconds of a matrix product by precision: the sum over ROWS. `num_threads`: by default as many as here."""
    before = torch.get_num_threads()

    def measure() -> dict[TextPrecision, float]:
        torch.set_num_threads(num_threads or before)
        return _measure_all(num_outputs, num_inputs)

    try:
        with ThreadPoolExecutor(1) as pool:  # its team of torch threads ends with it, see engine/threads.py
            return pool.submit(measure).result()
    finally:
        torch.set_num_threads(before)


@torch.no_grad()
def _measure_all(num_outputs: int, num_inputs: int) -> dict[TextPrecision, float]:
    num = max(1, MEASURED_WEIGHTS // (num_outputs * num_inputs))
    makers: dict[TextPrecision, Callable[[], nn.Module]] = {
        "float32": lambda: make_float32(torch.randn(num_outputs, num_inputs)),
        "int4": lambda: Int4Linear(_random_codes(num_outputs, num_inputs)),
    }
    layers = {precision: [make() for _ in range(num)] for precision, make in makers.items()}
    total_ms = dict.fromkeys(layers, 0.0)
    for num_rows in ROWS:
        input, best_s = torch.randn(num_rows, num_inputs), dict.fromkeys(layers, math.inf)
        for _ in range(REPEATS):
            for precision, same in layers.items():
                best_s[precision] = min(best_s[precision], _time(same, input))
        for precision, seconds in best_s.items():
            total_ms[precision] += seconds * 1e3 / num
    return total_ms


def _time(layers: list[nn.Module], input: Tensor) -> float:
    started = time.perf_counter()
    for layer in layers:
        layer(input)
    return time.perf_counter() - started


def _random_codes(num_outputs: int, num_inputs: int) -> Codes:
    values = torch.randn(num_outputs, num_inputs // GROUP).half()
    codes = torch.randint(0, 16, (num_outputs, num_inputs), dtype=torch.uint8)
    return Codes(codes_OI=codes, scales_OK=values, minima_OK=values)


def _cpu() -> list[str]:
    """What the system says of the first processor. Clouds give different ones the same name."""
    try:
        first = Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
    except OSError:
        return [platform.processor()]
    fields = dict(line.split("\t", 1) for line in first.splitlines() if "\t" in line)
    return [fields.get(name, "").strip("\t: ") for name in CPU_FIELDS]


def check_precision(precision: TextPrecision, base_folder: Path, *, is_on_cpu: bool) -> None:
    """Raise ModelFolderError where a base model or a device cannot compute in `precision`."""
    if precision in ("int8", "int4") and not is_on_cpu:
        raise ModelFolderError(f"{precision} weights are for CPUs: on a GPU use bfloat16 or float32")
    if precision == "int4" and not has_codes(base_folder):
        raise ModelFolderError(
            f"{base_folder} has no quantised weights that were made from its float32 weights, and int4 computes with "
            "them: use float32, bfloat16 or int8"
        )
    if precision == "int8" and not can_multiply_int8():
        raise ModelFolderError(
            "8-bit integers are multiplied on CPUs with AVX2 or AVX-512 VNNI, and this one has neither: use float32 or "
            "bfloat16"
        )
