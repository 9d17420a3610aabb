"""One torch thread a test process: tests share two cores."""

from __future__ import annotations

import torch

torch.set_num_threads(1)
