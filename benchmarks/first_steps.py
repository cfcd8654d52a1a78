"""How many bf16 weights change in the first steps of a fresh AdamW, and later: fp32 masters, gradients of noise.

python benchmarks/first_steps.py [--rate 1e-6] [--steps 100]
"""

import argparse

import torch

SHOWN = (1, 2, 5, 10, 30, 100)
"""steps"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rate", type=float, default=1e-6)
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args()
    torch.manual_seed(0)
    weights = torch.nn.Parameter(0.02 * torch.randn(1_000_000))
    optimizer = torch.optim.AdamW([weights], lr=options.rate)
    served = weights.detach().bfloat16()
    for step in range(1, options.steps + 1):
        weights.grad = torch.randn_like(weights)
        optimizer.step()
        before, served = served, weights.detach().bfloat16()
        if step in SHOWN:
            share = float((served != before).float().mean())
            print(f"step {step}: {share:.2%} of the bf16 weights changed at a learning rate of {options.rate:g}")


if __name__ == "__main__":
    main()
