"""A plain torch loop that publishes each step, with its metrics: deltawire is three lines of it.

python examples/plain_loop.py file:///tmp/plain
deltawire log file:///tmp/plain
"""

import sys

import torch
from torch import nn

import deltawire as dw


def main(bucket: str, steps: int = 10) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 256), nn.GELU(), nn.Linear(256, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    with dw.Publisher(dw.open_bucket(bucket, create=True)) as publisher:
        for step in range(int(steps)):
            inputs = torch.randn(64, 32)
            loss = nn.functional.mse_loss(model(inputs), inputs.sum(1, keepdim=True))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            report = publisher.publish(model, step=step, metrics={"loss": loss.item()})
            print(f"step {step}: loss {loss:.3f}, {report.density:.1%} changed, {report.wire_bytes:,} bytes")


if __name__ == "__main__":
    main(*sys.argv[1:])
