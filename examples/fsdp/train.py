"""A sharded training loop that publishes: two ranks, FSDP2, no full tensor anywhere.

    torchrun --nproc-per-node 2 examples/fsdp/train.py --bucket file:///tmp/fsdp-bucket

Any address that `dw.open_bucket` takes will do. Start it again with the same bucket and it continues the run; read any
version with `deltawire materialize`. A run without a base begins as a delta from all-zero bits: each rank writes the
shards it holds.
"""

import argparse

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

import deltawire as dw


class Model(nn.Module):
    """Embeds a token, mixes it, and scores the next one."""

    def __init__(self, vocabulary: int = 256, width: int = 64, depth: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.GELU()) for _ in range(depth))
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(tokens)
        for layer in self.layers:
            hidden = hidden + layer(hidden)
        return self.head(hidden)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bucket", required=True, help="where to publish: file://, s3://, gs://, az://, hf://")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--lr", type=float, default=1e-4)
    args = parser.parse_args()

    dist.init_process_group("cuda:nccl,cpu:gloo" if torch.cuda.is_available() else "gloo")
    torch.manual_seed(0)
    model = Model()
    for layer in model.layers:
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)

    data = torch.Generator().manual_seed(dist.get_rank())
    with dw.Publisher(dw.open_bucket(args.bucket), process_group=dist.group.WORLD) as publisher:
        for step in range(args.steps):
            tokens = torch.randint(256, (8, 33), generator=data).cumsum(1) % 7
            loss = nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            report = publisher.publish(model, step=step, metrics={"loss": loss.item()})
            if dist.get_rank() == 0:
                print(
                    f"step {step}: loss {loss.item():.3f}, version {report.version}, {report.density:.2%} changed, "
                    f"{report.wire_bytes:,} of {report.model_bytes:,} bytes in {1e3 * report.seconds:.0f} ms"
                )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
