"""What an update costs a GPU: write, digest and gap decode, against its memory bandwidth. Needs only torch and CUDA.

Synthetic 16-bit weights of 0.6 and 8 billion elements, 0.1, 1 and 3 % of them changed at random positions.
`--device cpu --elements 1000000` runs the same without a GPU: a check of the program, not of any GPU.

Stage: gather old bits and add steps. Write: scatter new bits. Digest: mix and sum every element. Decode: the bytes of
codec `gap`, as zstd gives them back, to positions and steps; on a GPU each is prefix sums. Bounds count the bytes that
must move: for gathers and scatters a sector of 32 bytes per position, read and (for a write) written.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch

SIZES = (600_000_000, 8_000_000_000)
SHARES = (0.001, 0.01, 0.03)
REPEATS = 10
SECTOR = 32
CHUNK = 1 << 26
GOLDEN, M1, M2 = 0x9E3779B97F4A7C15, 0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53
ESCAPE = 255


def signed(number: int) -> int:
    """The int64 with the bits of an unsigned 64-bit number."""
    return number - (1 << 64) if number >> 63 else number


def fmix64(h: torch.Tensor) -> torch.Tensor:
    """MurmurHash3's 64-bit finaliser, over int64 that wraps."""
    low = (1 << 31) - 1
    h = (h ^ (h >> 33 & low)) * signed(M1)
    h = (h ^ (h >> 33 & low)) * signed(M2)
    return h ^ (h >> 33 & low)


def digest_of(bits: torch.Tensor, start: int) -> torch.Tensor:
    """The sum of mix(start + i, bits[i]) mod 2^64, of flat int16; an int64."""
    places = torch.arange(start, start + bits.numel(), device=bits.device)
    return fmix64(fmix64(places + signed(GOLDEN)) ^ (bits.long() & 0xFFFF)).sum()


def digest(flat: torch.Tensor, part: Callable[[torch.Tensor, int], torch.Tensor] = digest_of) -> int:
    """The digest of a flat int16 tensor, as deltawire's of its bits."""
    starts = range(0, flat.numel(), CHUNK)
    return sum(int(part(flat[start : start + CHUNK], start)) for start in starts) % (1 << 64)


def read_tokens(data: torch.Tensor, first: torch.Tensor, start: int, base: torch.Tensor) -> torch.Tensor:
    """Values of tokens that begin where `first` says: `base` of their first byte, plus seven bits of every byte that
    comes `start` or more bytes after it."""
    token = torch.cumsum(first, 0) - 1
    begins = first.nonzero().reshape(-1)
    behind = torch.arange(data.numel(), device=data.device) - begins[token] - start
    more = torch.where(behind >= 0, (data.long() & 127) << (7 * behind.clamp(min=0)), 0)
    return base[begins].scatter_add(0, token, more)


def decode_gaps(data: torch.Tensor) -> torch.Tensor:
    """Positions from the bytes of `NAME.gaps` (docs/FORMAT.md §5.2). Whether a byte begins a token is decided by the
    last byte before it that is below 128, which ends any token, or 255, which goes on in any."""
    places = torch.arange(data.numel(), device=data.device)
    decides = (data < 128) | (data == ESCAPE)
    last = torch.cummax(torch.where(decides, places, -1), 0).values
    inside = (data[last.clamp(min=0)] == ESCAPE) & (last >= 0)
    first = torch.cat([inside.new_ones(min(data.numel(), 1)), ~inside[:-1]])
    return torch.cumsum(read_tokens(data, first, 1, data.long()) + 1, 0) - 1


def decode_steps(data: torch.Tensor) -> torch.Tensor:
    """Steps, as int16, from the bytes of `NAME.steps`: zigzag varints."""
    ends = data < 128
    first = torch.cat([ends.new_ones(min(data.numel(), 1)), ends[:-1]])
    folded = read_tokens(data, first, 0, torch.zeros_like(data, dtype=torch.int64))
    return (folded >> 1 ^ -(folded & 1)).short()


def encode_gaps(positions: torch.Tensor) -> torch.Tensor:
    """The bytes of `NAME.gaps`, for gaps below 2^21."""
    gaps = positions - torch.cat([positions.new_full((1,), -1), positions[:-1]]) - 1
    rest = gaps - ESCAPE
    extra = torch.where(rest < 0, 0, 1 + (rest >= 1 << 7).long() + (rest >= 1 << 14).long())
    at = torch.cumsum(1 + extra, 0) - 1 - extra
    data = torch.zeros(int(at[-1] + 1 + extra[-1]), dtype=torch.uint8, device=positions.device)
    data[at] = gaps.clamp(max=ESCAPE).byte()
    for number in range(3):
        chosen = extra > number
        goes_on = 128 * (extra[chosen] > number + 1)
        data[at[chosen] + 1 + number] = ((rest[chosen] >> 7 * number & 127) | goes_on).byte()
    return data


def milliseconds(work: Callable[[], object], device: str) -> float:
    """Median time of a call on the device, compiling and first touches left out."""
    times = []
    for _ in range(REPEATS + 2):
        if device != "cpu":
            torch.cuda.synchronize()
        started = time.perf_counter()
        work()
        if device != "cpu":
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - started))
    return statistics.median(times[2:])


def copy_bandwidth(elements: int, device: str) -> float:
    """Bytes a millisecond that a plain copy reads and writes."""
    source = torch.zeros(elements, dtype=torch.int16, device=device)
    target = torch.empty_like(source)
    return 4 * elements / milliseconds(lambda: target.copy_(source), device)


def measure(elements: int, share: float, bandwidth: float, device: str) -> None:
    """Print one line of stage, write and decode. `bandwidth` is in bytes a millisecond."""
    flat = torch.zeros(elements, dtype=torch.int16, device=device)
    positions = torch.unique(torch.randint(elements, (max(1, int(share * elements)),), device=device))
    count = positions.numel()
    steps = torch.where(torch.rand(count, device=device) < 0.5, -1, 1).short()
    gaps, zigzag = encode_gaps(positions), (1 + (steps > 0).byte()).contiguous()
    assert torch.equal(decode_gaps(gaps), positions)
    assert torch.equal(decode_steps(zigzag), steps)
    new = flat[positions] + steps
    staged = milliseconds(lambda: flat[positions] + steps, device)
    written = milliseconds(lambda: flat.__setitem__(positions, new), device)
    decoded = milliseconds(lambda: (decode_gaps(gaps), decode_steps(zigzag)), device)
    assert torch.equal(flat[positions], new)
    bounds = [
        count * (SECTOR + 8 + 2 + 2) / bandwidth,
        count * (2 * SECTOR + 8 + 2) / bandwidth,
        (gaps.numel() + zigzag.numel() + count * (8 + 2)) / bandwidth,
    ]
    told = [f"{took:.3f} ms ({took / bound:.1f}x its bound)" for took, bound in
            zip((staged, written, decoded), bounds, strict=True)]  # fmt: skip
    print(f"{elements:,} elements, {share:.1%} changed: stage {told[0]}, write {told[1]}, decode {told[2]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--elements", type=int, nargs="+", default=SIZES)
    options = parser.parse_args()
    device = options.device
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("gpu_apply needs a CUDA device, and this host has none: --device cpu tries the program")
    print(torch.cuda.get_device_name() if device == "cuda" else "cpu", "torch", torch.__version__)
    bandwidth = copy_bandwidth(min(1 << 29, max(options.elements)), device)
    print(f"copy: {bandwidth / 1e6:.1f} GB/s read and written")
    part = torch.compile(digest_of, dynamic=True) if device == "cuda" else digest_of
    for elements in options.elements:
        flat = torch.zeros(elements, dtype=torch.int16, device=device)
        took = milliseconds(lambda flat=flat: digest(flat, part), device)
        bound = 2 * elements / bandwidth
        print(f"{elements:,} elements: digest of all {took:.2f} ms ({took / bound:.1f}x reading them)")
        del flat
        for share in SHARES:
            measure(elements, share, bandwidth, device)


if __name__ == "__main__":
    main()
