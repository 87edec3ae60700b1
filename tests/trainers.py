"""What data modules ask a Trainer for, without one: any process of any number, at any step."""

from types import SimpleNamespace

import torch
from lightning.pytorch.loops.progress import _BatchProgress


class FakeTrainer:
    """The few attributes of a Trainer that loaders ask for."""

    def __init__(self, rank=0, world_size=1, accumulate=1, step=0, max_steps=10):
        self.global_rank, self.world_size, self.accumulate_grad_batches = rank, world_size, accumulate
        self.global_step, self.max_steps = step, max_steps
        self.max_epochs, self.limit_train_batches = -1, 1.0
        self.strategy = SimpleNamespace(root_device=torch.device("cpu"))
        self.fit_loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=_BatchProgress()))
