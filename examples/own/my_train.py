"""A model of your own, trained as a losscast run: `main` is called on every rank and told about its run.

cd examples/own && losscast submit function.yaml --follow
"""

import deepspeed
import torch
from torch import nn


class Recurrent(nn.Module):
    """A byte-level GRU: any module will do."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, width)
        self.cell = nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, 256)

    def forward(self, tokens, targets):
        hidden, _ = self.cell(self.embed(tokens))
        return nn.functional.cross_entropy(self.head(hidden).flatten(0, 1), targets.flatten())


def main(run, width=32):
    torch.manual_seed(run.spec.train.seed)
    model = Recurrent(width)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=run.lr(1)),
        config={
            "train_micro_batch_size_per_gpu": run.spec.batch_sequences // run.spec.parallel.dp,
            "zero_optimization": {"stage": run.spec.parallel.zero},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        },
    )
    step = run.resume(engine)  # 0, or the step of the newest committed checkpoint
    while step < run.total_steps:
        step += 1
        for group in engine.optimizer.param_groups:
            group["lr"] = run.lr(step)  # the schedule of run.yaml
        tokens, targets = (torch.from_numpy(x).to(engine.device) for x in run.batch(step))
        loss = engine(tokens, targets)
        engine.backward(loss)
        engine.step()
        if run.step(
            step, loss, engine=engine
        ):  # recorded, reported, saved when due; True: somebody asked to stop
            return
