"""vLLM's side of the seam: hands over the states before a picture's vokens. vLLM loads it by its name into the process
of its engine, and into each worker.

vLLM keeps the states of each layer that it is asked for among its KV blocks (`extract_hidden_states`), and calls a
connector when a request is done. This one takes the rows of the last positions of a request that names a ticket, and
sends them to the backend through a socket: no file is ever written. Requests without a ticket end as they always do.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.distributed.kv_transfer.kv_connector.v1.example_hidden_states_connector import (
    ExampleHiddenStatesConnector,
    ExampleHiddenStatesConnectorMetadata,
    PendingSave,
)
from vllm.platforms import current_platform
from vllm.v1.request import RequestStatus
from vllm.v1.sample import rejection_sampler

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request


class VokenConnector(ExampleHiddenStatesConnector):
    """Sends frames of a ticket (16 bytes) and the states (V, H) in float32."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        """Its extra config: `address`, a name in the abstract namespace, and `num_vokens`."""
        super().__init__(vllm_config, role, kv_cache_config)
        extra = self._kv_transfer_config.get_from_extra_config
        self._num_vokens = int(extra("num_vokens", 8))
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(f"\0{extra('address', '')}")
        self._sender = ThreadPoolExecutor(1, thread_name_prefix="vokens")
        if current_platform.is_cpu():
            rejection_sampler.expand_batch_to_tokens = expand_batch_to_tokens
        threading.Thread(target=self._end_with_backend, name="backend", daemon=True).start()

    def _end_with_backend(self) -> None:
        """The backend sends nothing: when its end is closed, its process is gone, and this one has nobody to serve."""
        self._socket.recv(1)
        os.kill(os.getpid(), signal.SIGKILL)

    # In the process of the scheduler

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> ExampleHiddenStatesConnectorMetadata:
        meta = ExampleHiddenStatesConnectorMetadata(pending_saves=list(self._pending_saves.values()))
        self._pending_saves.clear()
        return meta

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """Whether the request's blocks must stay until its states are taken."""
        ticket = (request.kv_transfer_params or {}).get("ticket")
        if ticket is None or request.status == RequestStatus.FINISHED_ABORTED:
            return False, None
        self._pending_saves[request.request_id] = PendingSave(
            req_id=request.request_id,
            filename=ticket,
            token_ids=torch.empty(request.num_prompt_tokens, dtype=torch.bool),
            block_ids=list(block_ids),
        )
        return True, None

    # In the worker

    def wait_for_save(self) -> None:
        """There are no files to lock."""

    def _submit_async_write(self, pending: PendingSave) -> None:
        """Copy the last rows and send them. `filename` is the ticket."""
        if not self._is_tp_rank_zero:
            return
        assert self._kv_cache is not None
        num_tokens = len(pending.token_ids)
        positions = torch.arange(num_tokens - self._num_vokens, num_tokens)
        blocks = torch.tensor(pending.block_ids)[positions // self._block_size].to(self._kv_cache.device)
        offsets = (positions % self._block_size).to(self._kv_cache.device)
        states_VH = self._kv_cache[blocks, :, offsets].flatten(1).float().cpu()
        self._sender.submit(self._socket.sendall, bytes.fromhex(pending.filename) + states_VH.numpy().tobytes())
        self._req_copy_events[pending.req_id] = _Copied()


def expand_batch_to_tokens(
    x: torch.Tensor, cu_num_tokens: torch.Tensor, num_tokens: int, replace_from: int = 0, replace_to: int = 0
) -> torch.Tensor:
    """Each request's temperature or top_p for each of its draft tokens.

    vLLM 0.32.0 on a CPU writes them into a copy as integers, and samples with whatever the memory held
    (`cpu_triton_utils._expand_kernel_impl`). This goes when it no longer does.
    """
    counts = torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1))
    replaced = torch.where(x == replace_from, torch.full_like(x, replace_to), x)
    return replaced.repeat_interleave(counts, output_size=num_tokens)


class _Copied:
    """Stands for the CUDA event of a copy that is done."""

    def query(self) -> bool:
        return True
