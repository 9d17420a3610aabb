"""llama.cpp writes text, on the GGUF file of the base model: `python -m benchmarks.peers.llamacpp GGUF THREADS`.

It runs in the peers' environment and answers questions as `turns.py` says.
"""

from __future__ import annotations

import itertools
import sys
import time

from llama_cpp import Llama

from benchmarks.turns import Measurements, answer_questions

CONTEXT_TOKENS = 1024


def load() -> Measurements:
    path, num_threads = sys.argv[1:]
    model = Llama(
        path, n_ctx=CONTEXT_TOKENS, n_threads=int(num_threads), n_threads_batch=int(num_threads), verbose=False
    )

    next(model.generate([0], temp=0.0))  # where it cannot compute on this machine, it fails here

    def text(prompts: list[list[int]], num_tokens: int) -> float:
        """Seconds of one greedy text after another; the end of the text is a token like others."""
        began = time.perf_counter()
        for ids in prompts:
            written = list(itertools.islice(model.generate(ids, temp=0.0), num_tokens))
            assert len(written) == num_tokens, written
            model.detokenize(written)
        return time.perf_counter() - began

    return {"text": text}


if __name__ == "__main__":
    answer_questions(load)
