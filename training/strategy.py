"""What turns losses into optimizer steps: torch's own optimizer here, DeepSpeed's ZeRO in zero.py."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from minigpt5.errors import NotFinite
from training.checkpoint import copy_to_host
from training.data.batches import Batch
from training.presets import OptimizerConfig
from training.workers import average_over_workers, is_first_worker

CPU = torch.device("cpu")


class Strategy(Protocol):
    """An optimizer, and how the workers share it."""

    trained: dict[str, nn.Parameter]
    communication_s: float
    """Seconds that workers have spent on each other's gradients and weights so far."""

    def losses(self, batch: Batch[Any], progress: float) -> dict[str, Tensor]:
        """The objective's losses of one batch."""

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of one batch to those of the batches before it."""

    def step(self, factor: float) -> None:
        """Use the gradients, the learning rates multiplied by `factor`. Raises NotFinite on every worker, and changes
        no weight, where the gradient is not finite."""

    def gathered(self, parameters: list[nn.Parameter]) -> contextlib.AbstractContextManager[None]:
        """Within it the first worker holds `parameters` whole, to read them. Called by every worker."""

    def state(self) -> dict[str, Any]:
        """Values by name under "trained", and torch's state under "optimizer", as copies in the host's memory. Called
        by every worker, and complete on the first."""

    def load(self, state: dict[str, Any]) -> None:
        """Continue from a state, of any strategy and any number of workers. Called by every worker."""


class TorchStrategy:
    """Torch's AdamW; every worker holds everything."""

    def __init__(self, objective: nn.Module, optimizer: torch.optim.Optimizer, config: OptimizerConfig) -> None:
        self.objective, self.optimizer, self.max_grad_norm = objective, optimizer, config.max_grad_norm
        self.trained = {name: p for name, p in objective.named_parameters() if p.requires_grad}
        self.rates = [group["lr"] for group in optimizer.param_groups]
        self.communication_s = 0.0

    def losses(self, batch: Batch[Any], progress: float) -> dict[str, Tensor]:
        return self.objective(batch, progress)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self, factor: float) -> None:
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        began = time.perf_counter()
        average_over_workers(self.trained)
        self.communication_s += time.perf_counter() - began
        norm = check_gradients(self.trained.values())
        if self.max_grad_norm:
            nn.utils.clip_grads_with_norm_(self.trained.values(), self.max_grad_norm, norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def gathered(self, parameters: list[nn.Parameter]) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def state(self) -> dict[str, Any]:
        if not is_first_worker():
            return {}
        trained = {name: p.detach() for name, p in self.trained.items()}
        return copy_to_host({"trained": trained, "optimizer": self.optimizer.state_dict()})

    @torch.no_grad()
    def load(self, state: dict[str, Any]) -> None:
        for name, value in state["trained"].items():
            self.trained[name].copy_(value)
        self.optimizer.load_state_dict(state["optimizer"])


def new_strategy(
    objective: nn.Module, groups: list[dict[str, Any]], config: OptimizerConfig, device: torch.device = CPU
) -> Strategy:
    """Move the objective to a worker's device, under the strategy that `config.zero_stage` asks for, with AdamW on
    `groups`."""
    if config.zero_stage != 3:  # which shares the weights out first
        objective.to(device)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, config.beta2), weight_decay=config.weight_decay, fused=True)
    _keep_settings(optimizer)
    if config.zero_stage is None:
        return TorchStrategy(objective, optimizer, config)
    if config.zero_stage == 0:  # DeepSpeed looks at the gradients of the other stages itself
        optimizer.register_step_pre_hook(_check_before_step)
    from training.zero import ZeroStrategy

    return ZeroStrategy(objective, optimizer, config)


def check_gradients(parameters: Iterable[nn.Parameter]) -> Tensor:
    """The norm of the gradient. Raises NotFinite where it is not: the step would spoil every weight."""
    norm = nn.utils.get_total_norm([one.grad for one in parameters if one.grad is not None])
    if not norm.isfinite():
        raise NotFinite(f"the gradient has the norm {norm.item()}")
    return norm


def _check_before_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    check_gradients(parameter for group in optimizer.param_groups for parameter in group["params"])


def _keep_settings(optimizer: torch.optim.Optimizer) -> None:
    """Let a loaded state bring its moments alone: weight decay and betas stay those of the run as it is told now."""
    settings = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]

    def restore(loaded: torch.optim.Optimizer) -> None:
        for group, own in zip(loaded.param_groups, settings, strict=True):
            group.update(own)

    optimizer.register_load_state_dict_post_hook(restore)
