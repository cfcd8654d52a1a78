"""A model that workers hold in parts, as those of vLLM do."""

import torch
from torch import nn

ATTENTION, MLP = "model.layers.0.self_attn.", "model.layers.0.mlp."
SHAPES = {
    "model.embed_tokens.weight": (250, 128),  # padded to 256 rows by the server
    f"{ATTENTION}q_proj.weight": (256, 128),
    f"{ATTENTION}k_proj.weight": (64, 128),  # two heads
    f"{ATTENTION}v_proj.weight": (64, 128),
    f"{ATTENTION}o_proj.weight": (128, 256),
    f"{MLP}gate_proj.weight": (256, 128),
    f"{MLP}up_proj.weight": (256, 128),
    f"{MLP}down_proj.weight": (128, 256),
    f"{MLP}experts.gate_up_proj": (3, 256, 128),  # gate and up in one, each cut by itself
    **{f"{MLP}experts.{number}.down_proj.weight": (64, 128) for number in range(4)},
    "model.norm.weight": (128,),
}


class Worker(nn.Module):
    """One of `size` workers: rows of what is fused into `qkv` and `gate_up`, columns of what follows, whole experts."""

    def __init__(self, rank: int, size: int, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self._rank, self._size = rank, size
        kv = 64 // min(size, 2)
        shapes = {"embed": (256 // size, 128), "qkv": (256 // size + 2 * kv, 128), "o": (128, 256 // size)}
        shapes |= {"gate_up": (512 // size, 128), "down": (128, 256 // size)}
        shapes |= {"experts_in": (3, 256 // size, 128), "experts_out": (max(1, 4 // size), 128, 64), "norm": (128,)}
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.zeros(shape, dtype=dtype), requires_grad=False))

    def load_weights(self, weights):
        for name, tensor in weights:
            self._load(name, tensor)

    def _load(self, name, tensor):
        rank, size = self._rank, self._size
        rows = lambda length: slice(rank * length // size, (rank + 1) * length // size)  # noqa: E731
        kv, q = 64 // min(size, 2), 256 // size
        head = rank * min(size, 2) // size * kv  # with four workers two have the same head
        match name.removeprefix("model.layers.0.").removeprefix("model.").split("."):
            case ["embed_tokens", _]:
                part = tensor[rows(256)]
                self.embed.data[: len(part)].copy_(part)
            case ["self_attn", "q_proj", _]:
                self.qkv.data[:q].copy_(tensor[rows(256)])
            case ["self_attn", ("k_proj" | "v_proj") as kind, _]:
                start = q + (kv if kind == "v_proj" else 0)
                self.qkv.data.narrow(0, start, kv).copy_(tensor[head : head + kv])
            case ["self_attn", "o_proj", _]:
                self.o.data.copy_(tensor[:, rows(256)])
            case ["mlp", ("gate_proj" | "up_proj") as kind, _]:
                self.gate_up.data.narrow(0, q if kind == "up_proj" else 0, q).copy_(tensor[rows(256)])
            case ["mlp", "down_proj", _]:
                self.down.data.copy_(tensor[:, rows(256)])
            case ["mlp", "experts", "gate_up_proj"]:
                half = 128 // size
                for number, part in enumerate(tensor.chunk(2, 1)):
                    self.experts_in.data.narrow(1, number * half, half).copy_(part[:, rows(128)])
            case ["mlp", "experts", number, "down_proj", _] if int(number) * size // 4 == rank:
                self.experts_out.data[int(number) % len(self.experts_out)].copy_(tensor.t())
            case ["norm", _]:
                self.norm.data.copy_(tensor)
