"""DeepSpeed's ZeRO in the place of the plain optimizer: gradients and optimizer state are shared out over workers.

0 nothing is shared out, 1 the optimizer's state, 2 the gradients too, 3 the parameters too. A checkpoint is gathered
into the plain loop's own, so that it belongs to no stage and to no number of workers.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
from collections.abc import Callable, Iterator
from typing import Any, Protocol, runtime_checkable

import deepspeed
import torch
from deepspeed.comm import comm
from deepspeed.utils import (
    lazy_init_hp_params_optimizer_state,
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)
from torch import Tensor, distributed, nn

from minigpt5.errors import NotFinite, TrainingError
from training.checkpoint import copy_to_host
from training.data.batches import Batch
from training.presets import OptimizerConfig
from training.workers import is_first_worker

MOMENTS = ("exp_avg", "exp_avg_sq")
M_MMAP_THRESHOLD, LARGE_BYTES = -3, 2**20
"""See mallopt(3)."""
BUCKET = 5_000_000
"""Elements that are reduced at once."""


@runtime_checkable
class HasOuterParameters(Protocol):
    """An objective some of whose parameters are read by other modules than their own."""

    def outer_parameters(self) -> list[nn.Parameter]: ...


class ZeroStrategy:
    """An objective under ZeRO; see training.strategy.Strategy. Needs an initialised process group."""

    def __init__(self, objective: nn.Module, optimizer: torch.optim.Optimizer, config: OptimizerConfig) -> None:
        if not distributed.is_initialized():
            raise TrainingError(
                f"zero_stage is {config.zero_stage} but there are no workers: set --workers to 1 or more"
            )
        if config.zero_stage == 3 and config.ema_decay:
            raise TrainingError("zero_stage is 3, which keeps no running average: set ema_decay=0")
        assert config.zero_stage is not None
        self.stage, self.num_parts = config.zero_stage, 0
        self.gradient_accumulation_steps = config.gradient_accumulation_steps
        self.communication_s = 0.0
        self.times_communication = config.times_communication
        self.trained = {name: p for name, p in objective.named_parameters() if p.requires_grad}
        self.rates = [group["lr"] for group in optimizer.param_groups]
        self.counts = [len(group["params"]) for group in optimizer.param_groups]
        self.order = [_name_of(p, self.trained) for group in optimizer.param_groups for p in group["params"]]
        # Gloo moves the data; DeepSpeed's own way through shared memory would compile for minutes on every machine.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        configuration = _configuration(config)
        if self.stage == 3:
            _return_freed_memory()
            _share_out(objective, configuration)
        model = objective if self.stage == 3 else _Trained(objective)
        self.engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=configuration, dist_init_required=False
        )

        if self.times_communication:
            comm.configure(enabled=True, prof_all=True, verbose=False)
        if self.stage == 3 and isinstance(objective, HasOuterParameters):
            for parameter in objective.outer_parameters():
                deepspeed.zero.register_external_parameter(objective, parameter)

    def losses(self, batch: Batch[Any], progress: float) -> dict[str, Tensor]:
        return self.engine(batch, progress)

    def backward(self, loss: Tensor) -> None:
        self.num_parts += 1
        self.engine.set_gradient_accumulation_boundary(self.num_parts == self.gradient_accumulation_steps)
        self.engine.backward(loss, scale_wrt_gas=False)

    def step(self, factor: float) -> None:
        for group, rate in zip(self.engine.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        self.engine.step()  # but for stage 0 it leaves out a step whose gradient is not finite, and says nothing
        norm = self.engine.get_global_grad_norm()
        if norm is not None and not 0 <= float(norm) < math.inf:  # it stands for others as infinite, or as -1
            raise NotFinite("the gradient's norm is not finite")
        self.num_parts = 0
        if self.times_communication:
            self.communication_s += sum(timer.elapsed() for timer in comm.timers.get_timers().values()) / 1000
            comm.comms_logger.reset_data()

    @contextlib.contextmanager
    def gathered(self, parameters: list[nn.Parameter]) -> Iterator[None]:
        with deepspeed.zero.GatheredParameters(parameters, enabled=self.stage == 3):
            yield

    def state(self) -> dict[str, Any]:
        """Gather from all workers what `TorchStrategy.state` gives after the same steps, a tensor at a time."""
        keep: Callable[[Any], Any] = copy_to_host if is_first_worker() else lambda gathered: None
        if self.stage == 0:
            values = {name: p.detach() for name, p in self.trained.items()}
            return keep({"trained": values, "optimizer": self.engine.optimizer.state_dict()})
        self._link_moments()
        values = {name: keep(safe_get_full_fp32_param(p)) for name, p in self.trained.items()}
        moments = {
            index: {kind: keep(safe_get_full_optimizer_state(self.trained[name], kind)) for kind in MOMENTS}
            | {"step": torch.tensor(float(self._step()))}
            for index, name in enumerate(self.order)
        }
        groups, first = [], 0
        for group, count in zip(self.engine.optimizer.param_groups, self.counts, strict=True):
            kept = {key: value for key, value in group.items() if key != "params"}
            groups.append(kept | {"params": list(range(first, first + count))})
            first += count
        return {"trained": values, "optimizer": {"state": moments, "param_groups": groups}}

    def load(self, state: dict[str, Any]) -> None:
        """Resume from a state of any stage and any number of workers. Called by all."""
        if self.stage == 0:
            with torch.no_grad():
                for name, value in state["trained"].items():
                    self.trained[name].copy_(value)
            self.engine.optimizer.load_state_dict(state["optimizer"])
            return
        self._link_moments()
        for name, value in state["trained"].items():
            parameter = self.trained[name]
            safe_set_full_fp32_param(parameter, value)  # what is stepped, a copy of what is read
            with deepspeed.zero.GatheredParameters(parameter, modifier_rank=0, enabled=self.stage == 3):
                parameter.data.copy_(value)
        for index, name in enumerate(self.order):
            for kind in MOMENTS:
                safe_set_full_optimizer_state(self.trained[name], state["optimizer"]["state"][index][kind], kind)
        for moments in self.engine.optimizer.optimizer.state.values():
            moments["step"] = state["optimizer"]["state"][0]["step"].to(moments["exp_avg"].device, copy=True)

    def _link_moments(self) -> None:
        """Let DeepSpeed find every moment: it makes them at the first step, and then links those of the first group
        of parameters alone."""
        zero = self.engine.optimizer
        flat = zero.fp32_partitioned_groups_flat if self.stage == 3 else zero.single_partition_of_fp32_groups
        for index, partition in enumerate(flat):
            if not zero.optimizer.state[partition]:
                zeros = {kind: torch.zeros_like(partition) for kind in MOMENTS}
                zero.optimizer.state[partition] = {"step": partition.new_zeros(()), **zeros}
            if self.stage < 3:
                lazy_init_hp_params_optimizer_state(zero.bit16_groups[index], partition, zero.optimizer.state)

    def _step(self) -> float:
        return max(float(moments["step"]) for moments in self.engine.optimizer.optimizer.state.values())


class _Trained(nn.Module):
    """An objective of which DeepSpeed sees what is trained. It copies the first worker's values into those of the
    others: frozen weights are equal already, and a page of a mapped file that is written to is shared no more."""

    def __init__(self, objective: nn.Module) -> None:
        super().__init__()
        self.objective = objective

    def forward(self, batch: object, progress: float) -> dict[str, Tensor]:
        return self.objective(batch, progress)

    def named_parameters(self, *args: Any, **options: Any) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, one) for name, one in super().named_parameters(*args, **options) if one.requires_grad)


def _return_freed_memory() -> None:
    """Let glibc give freed blocks of LARGE_BYTES back to the kernel. It would keep them, and no gathered weight fits in
    the gaps, since tensors are aligned: a worker would come to hold most of the model. Other libraries do so anyway."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, LARGE_BYTES)


def _share_out(objective: nn.Module, configuration: dict[str, Any]) -> None:
    """Leave each worker its part of every parameter, one parameter at a time: no device ever holds all of them.

    DeepSpeed copies the first worker's values into those of the others, which may lie in a mapped file: a parameter is
    copied first, since a page that is written to is shared no more.
    """
    init = deepspeed.zero.Init(module=nn.Module(), config_dict_or_path=configuration)
    for parameter in objective.parameters():
        parameter.data = parameter.data.clone()
        init._convert_to_zero_parameters([parameter])


def _name_of(parameter: nn.Parameter, trained: dict[str, nn.Parameter]) -> str:
    return next(name for name, other in trained.items() if other is parameter)


def _configuration(config: OptimizerConfig) -> dict[str, Any]:
    sharing: dict[str, Any] = {
        "stage": config.zero_stage,
        "reduce_bucket_size": BUCKET,
        "overlap_comm": torch.cuda.is_available(),
    }
    if config.zero_stage == 3:
        live = config.zero_live_parameters
        sharing |= {
            "stage3_max_live_parameters": live,
            "stage3_max_reuse_distance": live,
            "stage3_prefetch_bucket_size": live // 4,
        }
    if config.zero_offload:
        sharing["offload_optimizer"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": 1,  # DeepSpeed sees no rows: the loop counts them
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.max_grad_norm,
        "zero_optimization": sharing,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }
