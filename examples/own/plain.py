"""A DeepSpeed script that knows nothing of losscast: `torchrun --nproc-per-node 2 plain.py --steps 40` runs it as well.

cd examples/own && losscast submit script.yaml --follow
"""

import argparse

import deepspeed
import torch
from torch import nn

CONFIG = {
    "train_micro_batch_size_per_gpu": 8,
    "gradient_accumulation_steps": 2,
    "gradient_clipping": 1.0,
    "optimizer": {"type": "AdamW", "params": {"lr": 3e-3, "torch_adam": True}},
    "zero_optimization": {"stage": 1},
    "steps_per_print": 1_000_000,
}


class Regression(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 1))

    def forward(self, x, y):
        return nn.functional.mse_loss(self.layers(x), y)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=100)
    args = parser.parse_args()
    deepspeed.init_distributed()
    torch.manual_seed(0)
    model = Regression()
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=CONFIG)
    draw = torch.Generator().manual_seed(torch.distributed.get_rank())
    truth = torch.randn(16, 1, generator=torch.Generator().manual_seed(1))
    for _ in range(args.steps * CONFIG["gradient_accumulation_steps"]):
        x = torch.randn(8, 16, generator=draw)
        loss = engine(x.to(engine.device), (x @ truth).to(engine.device))
        engine.backward(loss)
        engine.step()
        if engine.is_gradient_accumulation_boundary() and torch.distributed.get_rank() == 0:
            print(f"loss {loss.item():.6f}", flush=True)
    torch.distributed.destroy_process_group()  # without it gloo's threads abort some Pythons that are about to exit


if __name__ == "__main__":
    main()
