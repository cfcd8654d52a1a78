"""What an update costs a GPU: gather, add and scatter, against its memory bandwidth. Needs only torch and CUDA.

Synthetic bf16 weights of 0.6 and 8 billion elements, 1 % of them changed at random positions. The bound counts 32 bytes
(one sector) read and written for each position, and the positions and steps themselves.
"""

import statistics

import torch

SIZES = (600_000_000, 8_000_000_000)
SHARES = (0.001, 0.01, 0.03)
REPEATS = 10
SECTOR = 32


def milliseconds(work) -> float:
    """Median time of a call on the device."""
    times = []
    for _ in range(REPEATS + 2):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop))
    return statistics.median(times[2:])


def copy_bandwidth() -> float:
    """GB/s read and written by a plain copy."""
    source = torch.empty(1 << 29, dtype=torch.int16, device="cuda")
    target = torch.empty_like(source)
    return 4 * source.numel() / milliseconds(lambda: target.copy_(source)) / 1e6


def main() -> None:
    if not torch.cuda.is_available():
        raise SystemExit("gpu_apply needs a CUDA device, and this host has none")
    print(torch.cuda.get_device_name())
    bandwidth = copy_bandwidth()
    print(f"copy: {bandwidth:.0f} GB/s")
    for size in SIZES:
        flat = torch.zeros(size, dtype=torch.int16, device="cuda")
        for share in SHARES:
            positions = torch.unique(torch.randint(size, (int(share * size),), device="cuda"))
            steps = torch.ones(positions.numel(), dtype=torch.int16, device="cuda")
            staged = milliseconds(lambda at=positions, by=steps, into=flat: into[at] + by)
            new = flat[positions] + steps
            written = milliseconds(lambda at=positions, bits=new, into=flat: into.__setitem__(at, bits))
            bound = positions.numel() * (2 * SECTOR + 8 + 2) / bandwidth / 1e6
            print(
                f"{size / 1e9:.1f} B elements, {share:.1%}: stage {staged:.2f} ms, write {written:.2f} ms; "
                f"the bandwidth bound of a write is {bound:.2f} ms"
            )
        del flat


if __name__ == "__main__":
    main()
