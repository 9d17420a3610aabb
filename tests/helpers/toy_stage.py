"""A small stage whose examples are a function of their ids, with a part that some examples do not touch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from training.data.batches import Batch
from training.presets import OptimizerConfig, Preset

TOY = Preset(
    stage="align",
    steps=50,
    batch_size=8,
    optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=5),
    log_every=1,
    checkpoint_every_s=0.0,
)
WIDTH = 16


class Toy(nn.Module):
    """Regression by a frozen part and two trained ones; the second reads one example of two only."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.words, self.picture = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, batch: Batch[Tensor], progress: float) -> dict[str, Tensor]:
        device = self.words.weight.device
        rows = torch.stack(batch.examples).to(device)
        has_picture = torch.tensor(batch.ids, device=device)[:, None] % 2 == 0
        states = self.words(torch.tanh(self.frozen(rows)))
        said = torch.where(has_picture, states + self.picture(states), states)
        return {"loss": (said - rows.flip(1)).square().mean()}


class ToyStage:
    def __init__(self) -> None:
        self.objective = Toy()

    def parameter_groups(self) -> list[dict[str, object]]:
        toy = self.objective
        return [
            {"params": list(toy.words.parameters()), "lr": TOY.optimizer.learning_rate},
            {"params": list(toy.picture.parameters()), "lr": 2 * TOY.optimizer.learning_rate},
        ]

    def draw_sheet(self, path: Path) -> None: ...
    def write_sample(self) -> bytes | None: ...
    def saved_parameters(self) -> list[nn.Parameter]:
        return list(self.objective.parameters())

    def save(self, folder: Path) -> None: ...


def batches(rank: int, num_workers: int) -> Callable[[int], Iterator[Batch[Tensor]]]:
    """A worker's share of each global batch."""

    def start(step: int) -> Iterator[Batch[Tensor]]:
        share = TOY.batch_size // num_workers
        while True:
            first = step * TOY.batch_size + rank * share
            ids = list(range(first, first + share))
            rows = [torch.randn(WIDTH, generator=torch.Generator().manual_seed(row_id)) for row_id in ids]
            yield Batch(ids=ids, examples=rows)
            step += 1

    return start
