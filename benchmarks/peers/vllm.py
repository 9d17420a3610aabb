"""vLLM on the CPU writes text, with our merged model: `python -m benchmarks.peers.vllm FOLDER`.

It runs in the peers' environment and answers questions as `turns.py` says. The weights are bfloat16.
"""

from __future__ import annotations

import os
import sys
import time

from benchmarks.turns import Measurements, answer_questions

CONTEXT_TOKENS = 1024
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"}


def load() -> Measurements:
    from vllm import LLM, SamplingParams, TokensPrompt  # it prints as it is imported

    model = LLM(model=sys.argv[1], dtype="bfloat16", max_model_len=CONTEXT_TOKENS, max_num_seqs=16, enforce_eager=True)

    def text(prompts: list[list[int]], num_tokens: int) -> float:
        """Seconds of greedy texts that are written at once; the end of the text is a token like others."""
        sampling = SamplingParams(temperature=0.0, min_tokens=num_tokens, max_tokens=num_tokens, ignore_eos=True)
        began = time.perf_counter()
        replies = model.generate([TokensPrompt(prompt_token_ids=ids) for ids in prompts], sampling, use_tqdm=False)
        seconds = time.perf_counter() - began
        assert all(len(reply.outputs[0].token_ids) == num_tokens for reply in replies)
        return seconds

    return {"text": text}


if __name__ == "__main__":
    os.environ.update(ENVIRONMENT)
    answer_questions(load)
