"""How long an update stops a vLLM server: deltawire beside vLLM's own ways, on this machine, in one run.

A Qwen3-0.6B-shaped model with random weights (`--small` for one of a million parameters) gets deltas of 0.1, 1 and 3 %
of its weights. Everything here is synthetic but the server, the bucket and the clock. Ratios are what carries over.
"""

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

import httpx
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3Config, Qwen3ForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))
from random_models import SHAPES
from servers import Server, save_checkpoint  # the tests' own way to a server

import deltawire as dw
from deltawire.follow.follower import Follower
from deltawire.runlog.records import Position
from deltawire.vllm.client import EngineClient

HERE = Path(__file__).parent
MILLION = {
    "vocab_size": 4096, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
}  # fmt: skip
SHARES = (0.001, 0.01, 0.03)
REPEATS = 3
WINDOW = 10
"""seconds from one update to the next, while throughput is measured"""
STALLED = 300
"""seconds without a token"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="a model of a million parameters")
    parser.add_argument("--seconds", type=int, default=60, help="of generation, of three kinds each (0: skip)")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        torch.manual_seed(0)
        shape = MILLION if options.small else SHAPES["0.6b"]
        config = Qwen3Config(**{**shape, "max_position_embeddings": 2048, "tie_word_embeddings": True})
        model = Qwen3ForCausalLM(config)
        print(f"model: {sum(p.numel() for p in model.parameters()):,} random parameters; {os.cpu_count()} cores")
        save_checkpoint(folder / "model", model)
        del model
        path = os.pathsep.join(filter(None, [str(HERE / "plugin"), os.environ.get("PYTHONPATH")]))
        server = Server(folder / "model", folder / "vllm.log", options=("--max-model-len", "2048"), PYTHONPATH=path)
        try:
            measure(folder, server.wait(), options.seconds, options.small)
        finally:
            server.stop()


class Trainer:
    """Random edits of a checkpoint, published to a folder."""

    def __init__(self, folder: Path) -> None:
        self.weights = load_file(folder / "model" / "model.safetensors")
        self.url = (folder / "bucket").as_uri()
        self.publisher = dw.Publisher(dw.open_bucket(self.url, create=True), assets=folder / "model")
        self.random = torch.Generator().manual_seed(1)

    def publish(self, share: float) -> Position:
        for tensor in self.weights.values() if share else ():
            flat = tensor.view(torch.int16).reshape(-1)
            count = max(1, int(share * flat.numel()))
            flat[torch.randint(flat.numel(), (count,), generator=self.random)] += 1
        self.publisher.publish(self.weights)
        position = self.publisher.flush(600)
        assert position is not None
        return position


def measure(folder: Path, server, seconds: int, small: bool) -> None:
    """Print what was measured, and which of the claims made of it hold here."""
    trainer = Trainer(folder)
    trainer.publish(0)
    with Follower(trainer.url, EngineClient(server.url)) as follower, EngineClient(server.url) as engine:
        follower.step()
        server.logprobs([1, 2, 3])
        idle = [pause_and_resume(engine) for _ in range(10)]
        print(f"a pause and a resume with nothing between: {statistics.median(idle):.1f} ms")
        rows = {}
        for share in SHARES:
            reports, patches = [], []
            for _ in range(REPEATS):
                before = {name: tensor.clone() for name, tensor in trainer.weights.items()}
                trainer.publish(share)
                started = time.perf_counter()
                report = follower.step()
                reports.append((report, time.perf_counter() - started))
                write_patches(folder / "patch.safetensors", before, trainer.weights)
                del before
                patches.append(call(server, "bench_patches", str(folder / "patch.safetensors")))
            rows[share] = row(reports, patches)
            show(share, rows[share], statistics.median(idle))
        save_file(trainer.weights, folder / "model" / "model.safetensors", {"format": "pt"})
        ways = {"full reload from disk": False, "layerwise reload from memory": True}
        reloads = {}
        for name, in_memory in ways.items():
            took = reloads[in_memory] = 1e3 * statistics.median(
                call(server, "bench_reload", str(folder / "model"), in_memory) for _ in range(REPEATS)
            )
            ratios = ", ".join(f"{took / rows[share]['write_ms']:.0f}x at {share:.1%}" for share in SHARES)
            print(f"{name}: {took:.0f} ms; deltawire's write is shorter {ratios}")
        print(f"a bare copy of all weights, memory to memory, on one thread: {bare_copy(trainer.weights):.0f} ms")
        kept = throughput(trainer, server, seconds) if seconds else None
        assert engine.audit().mismatched == []
        print("audit: every weight is what was published")
    trainer.publisher.close(60)
    if small:
        beside = max(row["pause_ms"] for row in rows.values()) - statistics.median(idle)
        judge("the outer pause is within 15 ms of a pause with nothing in it", beside <= 15, f"{beside:.1f} ms")
        return
    for share, least in ((0.001, 40), (0.01, 10)):
        ratio = rows[share]["patch_ms"] / rows[share]["write_ms"]
        judge(f"{least} times shorter than vLLM's sparse loader at {share:.1%}", ratio >= least, f"{ratio:.1f}x")
    ratio = reloads[False] / rows[0.01]["write_ms"]
    judge("25 times shorter than a full reload at 1 %", ratio >= 25, f"{ratio:.1f}x")
    if kept is not None:
        judge("throughput within 10 % of that without updates", kept[True] >= 0.9, f"{kept[True]:.1%}")
        judge("throughput within 10 % where KV is kept", kept[False] >= 0.9, f"{kept[False]:.1%}")


def judge(claim: str, holds: bool, measured: str) -> None:
    print(f"{'holds' if holds else 'MISSED'}: {claim} ({measured})")


def row(reports: list, patches: list[float]) -> dict[str, float]:
    median = statistics.median
    return {
        "changed": median(report.changed for report, _ in reports),
        "bytes": median(report.wire_bytes for report, _ in reports),
        "write_ms": median(report.write_ms for report, _ in reports),
        "pause_ms": median(report.pause_ms for report, _ in reports),
        "total_ms": 1e3 * median(total for _, total in reports),
        "patch_ms": 1e3 * median(patches),
    }


def show(share: float, row: dict[str, float], idle: float) -> None:
    size, ratio, beside = row["bytes"] / 1e6, row["patch_ms"] / row["write_ms"], row["pause_ms"] - idle
    print(
        f"{share:.1%} changed ({row['changed']:,.0f} weights, {size:.1f} MB): write {row['write_ms']:.2f} ms, "
        f"pause {row['pause_ms']:.1f} ms ({beside:+.1f} beside nothing), stage to served {row['total_ms']:.0f} ms; "
        f"vLLM's sparse loader {row['patch_ms']:.1f} ms = {ratio:.0f}x the write"
    )


def throughput(trainer: Trainer, server, seconds: int) -> dict[bool, float]:
    """Tokens a second of four streams with an update of 1 % every ten seconds, as a share of those without: where KV is
    made anew (True, the default) and where it is kept (False).

    Windows of ten seconds, of the three kinds in turns, so that all see the same machine. The versions are published
    before: a trainer computes elsewhere.
    """
    rounds = math.ceil(seconds / WINDOW)
    versions = [trainer.publish(0.01).version for _ in range(2 * rounds)]
    stop, count = threading.Event(), [0]
    streams = [threading.Thread(target=generate, args=(server, stop, count), daemon=True) for _ in range(4)]
    for stream in streams:  # apart, so that an update meets short requests and long ones
        stream.start()
        time.sleep(WINDOW / 4)
    kinds = (None, True, False)
    tokens, spent = dict.fromkeys(kinds, 0), dict.fromkeys(kinds, 0.0)
    for clear in kinds * rounds:
        before, started = count[0], time.perf_counter()
        if clear is not None:
            with Follower(trainer.url, EngineClient(server.url), pin=versions.pop(0), clear_cache=clear) as follower:
                follower.step()
        time.sleep(max(0.0, started + WINDOW - time.perf_counter()))
        tokens[clear] += count[0] - before
        spent[clear] += time.perf_counter() - started
    stop.set()
    for stream in streams:
        stream.join(STALLED)
    rates = {clear: tokens[clear] / spent[clear] for clear in kinds}
    kept = {clear: rates[clear] / rates[None] for clear in (True, False)}
    print(
        f"{spent[None]:.0f} s of four streams without updates: {rates[None]:.1f} tokens/s; with one of 1 % every "
        f"{WINDOW} s: {rates[True]:.1f} ({kept[True]:.1%}), {rates[False]:.1f} where KV is kept ({kept[False]:.1%})"
    )
    return kept


def generate(server, stop: threading.Event, count: list[int]) -> None:
    body = {"model": "policy", "prompt": [5, 6, 7], "max_tokens": 100, "ignore_eos": True, "stream": True}
    while not stop.is_set():
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=STALLED) as answer:
            for line in answer.iter_lines():
                count[0] += line.startswith("data: {")
                if stop.is_set():
                    break


def bare_copy(weights: dict[str, torch.Tensor]) -> float:
    """Milliseconds that one thread takes to copy everything: less than it needs to reload it."""
    torch.set_num_threads(1)
    copies = {name: tensor.clone() for name, tensor in weights.items()}
    times = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        for name, tensor in weights.items():
            copies[name].copy_(tensor)
        times.append(time.perf_counter() - started)
    return 1e3 * statistics.median(times)


def pause_and_resume(engine: EngineClient) -> float:
    started = time.perf_counter()
    engine.pause("keep", clear_cache=True)
    engine.resume()
    return 1e3 * (time.perf_counter() - started)


def write_patches(path: Path, before: dict, after: dict) -> None:
    tensors, shapes = {}, {}
    for name, new in after.items():
        at = (before[name].view(torch.int16) != new.view(torch.int16)).reshape(-1).nonzero().reshape(-1)
        if at.numel():
            tensors[f"{name}.at"], tensors[f"{name}.to"] = at, new.reshape(-1)[at]
            shapes[name] = ",".join(map(str, new.shape))
    save_file(tensors, path, shapes)


def call(server, method: str, *arguments: object) -> float:
    answer = httpx.post(f"{server.url}/collective_rpc", json={"method": method, "args": arguments}, timeout=600)
    if answer.status_code != 200:
        raise RuntimeError(f"{method}: {answer.text[:500]}; {server.log.read_text(errors='replace')[-3000:]}")
    return float(json.loads(answer.content)["results"][0])


if __name__ == "__main__":
    main()
