"""A tile's changes as Rice-coded lists, in torch, on the device where the tensors lie: no step is serial but the rungs.

Lists are found by prefix sums over the ones of UNARY; ranks by counting classes in blocks. Tensors stand for numpy's
arrays; elements are signed integers of the same width, as torch computes with few unsigned ones. Bit for bit what
`lists` and `classes` write and read.
"""

from typing import Any

import numpy as np
import torch

from deltawire.errors import FormatError, WrongBase
from deltawire.format.codecs.classes import CLASSES, Scheme
from deltawire.format.codecs.lists import (
    CHANGED,
    INVERTED,
    LADDER,
    WRITTEN,
    Changes,
    Facts,
    K,
    Unpacked,
    plan,
    rice,
    rungs,
)

BLOCK = 256
"""elements whose classes are counted together"""
AT_ONCE = 1 << 16
"""changes whose blocks are looked at together: 16 MiB of them"""
Tensor = Any


def pack(changes: Changes) -> tuple[Facts, Tensor]:
    """As `lists.pack`; ranks, steps, live rows and the payload are tensors."""
    steps: Tensor = changes.steps
    low = torch.where(steps < 0, ~steps, steps - 1).long()  # |step| - 1, without its overflow
    bits, lengths = 8 * steps.element_size(), torch.zeros_like(low)
    for bit in range(bits - 1):
        lengths += (low >> bit) != 0
    owner = _owners(changes.changed, steps.device)
    ladder = [torch.bincount(owner[lengths >= level], minlength=changes.changed.size) for level in range(bits)]
    facts = plan(changes.population, torch.stack(ladder, 1).cpu().numpy())
    members, shapes = _position_lists(changes, facts)
    more, more_shapes = _ladder_lists(facts, owner, lengths)
    low_bits, unary = _coded(torch.cat([members, *more]), np.array(shapes + more_shapes))
    raw = _fields(low, (lengths - 1).clamp(min=0))
    head = []
    if changes.live is not None:
        live: Tensor = changes.live
        listed, written = _listed(live, changes.rows, 2 * live.numel() > changes.rows)
        head = list(_coded(listed, np.array([(written, rice(changes.rows, written))])))
    return facts, _bytes(torch.cat([*head, low_bits, raw, (steps < 0).byte(), unary]))


def _owners(sizes: Any, device: Any) -> Tensor:
    """0 as often as the first size says, 1 as often as the second, and so on."""
    sizes = torch.as_tensor(sizes, device=device)
    return torch.repeat_interleave(torch.arange(sizes.numel(), device=device), sizes)


def _listed(members: Tensor, n: int, inverted: bool) -> tuple[Tensor, int]:
    if inverted:
        others = torch.ones(n, dtype=torch.bool, device=members.device)
        others[members] = False
        members = torch.nonzero(others).view(-1)
    return members, members.numel()


def _position_lists(changes: Changes, facts: Facts) -> tuple[Tensor, list[tuple[int, int]]]:
    """The listed ranks of every class, and how many and k of each list."""
    at, parts, shapes = 0, [], []
    for row, n in zip(facts, changes.population.tolist(), strict=True):
        own: Tensor = changes.ranks[at : at + int(row[CHANGED])]
        at += int(row[CHANGED])
        if row[CHANGED]:
            parts.append(_listed(own, n, bool(row[INVERTED]))[0])
            shapes.append((int(row[WRITTEN]), int(row[K])))
    return torch.cat(parts), shapes


def _ladder_lists(facts: Facts, owner: Tensor, lengths: Tensor) -> tuple[list[Tensor], list[tuple[int, int]]]:
    parts, shapes = [], []
    for level in range(1, facts.shape[1] - LADDER):
        tops, chosen = facts[:, LADDER + level - 1], facts[:, LADDER + level]
        if not tops.any():
            break
        inverted = torch.as_tensor(2 * chosen > tops, device=owner.device)
        starts = torch.as_tensor(np.cumsum(tops) - tops, device=owner.device)
        ordinals = torch.arange(owner.numel(), device=owner.device) - starts[owner]
        climbs = lengths >= level
        parts.append(ordinals[climbs ^ inverted[owner]])
        written = np.minimum(chosen, tops - chosen)
        shapes += [(w, rice(n, w)) for n, w in zip(tops.tolist(), written.tolist(), strict=True) if n]
        owner, lengths = owner[climbs], lengths[climbs]
    return parts, shapes


def _coded(members: Tensor, shapes: Any) -> tuple[Tensor, Tensor]:
    """LOW and UNARY of lists that stand one behind another; `shapes` tells of each how many are listed, and k."""
    device = members.device
    starts = torch.as_tensor(np.cumsum(shapes[:, 0]) - shapes[:, 0], device=device)
    owner, ks = _owners(shapes[:, 0], device), torch.as_tensor(shapes[:, 1], device=device)
    first = starts[owner] == torch.arange(members.numel(), device=device)
    gaps = members - torch.where(first, torch.full_like(members, -1), members.roll(1)) - 1
    widths = ks[owner]
    ends = ((gaps >> widths) + 1).cumsum(0)
    unary = torch.zeros(int(ends[-1]) if ends.numel() else 0, dtype=torch.uint8, device=device)
    unary[ends - 1] = 1
    return _fields(gaps, widths), unary


def _fields(values: Tensor, widths: Tensor) -> Tensor:
    """So many low bits of each value, one after another."""
    at = widths.cumsum(0)
    out = torch.zeros(int(at[-1]) if at.numel() else 0, dtype=torch.uint8, device=values.device)
    at = at - widths
    for bit in range(int(widths.max()) if widths.numel() else 0):
        wide = widths > bit
        out[at[wide] + bit] = (values[wide] >> bit & 1).byte()
    return out


def _bytes(bits: Tensor) -> Tensor:
    eights = torch.nn.functional.pad(bits, (0, -bits.numel() % 8)).view(-1, 8).int()
    return (eights << torch.arange(8, device=bits.device, dtype=torch.int32)).sum(1).byte()


def unpack(facts: Facts, payload: Tensor, *, most: int, kind: Any, rows: int, dead: int) -> Unpacked:
    """As `lists.unpack`; `kind` is the steps' torch dtype, and ranks, steps and listed rows are tensors."""
    bits = (payload[:, None] >> torch.arange(8, device=payload.device, dtype=torch.uint8) & 1).view(-1)
    at, listed = 0, None
    if dead:
        written = min(dead, rows - dead)
        k = rice(rows, written)
        listed, at = _read(bits, [(rows, written, k)], 0, written * k)
    own = facts[facts[:, CHANGED] > 0]
    shapes = [(m + w if inverted else most, w, k) for m, w, k, inverted in own[:, :LADDER].tolist()]
    shapes += [(n, w, rice(n, w)) for rung in rungs(facts) for _, n, _, w in rung]
    total, raw_at = int(own[:, CHANGED].sum()), at + sum(w * k for _, w, k in shapes)
    sign_at = raw_at + int(facts[:, LADDER + 2 :].sum())
    members, end = _read(bits, shapes, at, sign_at + total)
    if (end + 7) // 8 != payload.numel() or bool(bits[end:].any()):
        raise FormatError("bits behind the last list of a tile")
    done, ranks = 0, []
    for m, w, _, inverted in own[:, :LADDER].tolist():
        ranks.append(_chosen(members[done : done + w], m, bool(inverted)))
        done += w
    lengths = _climb(facts, members[done:], total)
    return Unpacked(torch.cat(ranks), _steps(bits, raw_at, sign_at, lengths, kind), listed, dead < rows - dead)


def _read(bits: Tensor, shapes: list[tuple[int, int, int]], low_at: int, unary_at: int) -> tuple[Tensor, int]:
    """The members of lists (n, how many are listed, k), one list behind another, and the bit behind the last."""
    sizes = np.array([w for _, w, _ in shapes])
    total = int(sizes.sum())
    ones = torch.nonzero(bits[unary_at:]).view(-1)[:total]
    if unary_at > bits.numel() or ones.numel() < total:
        raise FormatError("the payload of a tile ends inside its lists")
    owner = _owners(sizes, bits.device)
    n, k = (torch.tensor([shape[i] for shape in shapes], device=bits.device)[owner] for i in (0, 2))
    quotients = torch.diff(ones, prepend=ones.new_full((1,), -1)) - 1
    low = torch.zeros_like(quotients)
    at = low_at + k.cumsum(0) - k
    for bit in range(max((k for _, w, k in shapes if w), default=0)):
        wide = k > bit
        low[wide] |= bits[at[wide] + bit].long() << bit
    sums = torch.where(quotients > n >> k, n, (quotients << k) | low) + 1
    sums = torch.cat([sums.new_zeros(1), sums.cumsum(0)])
    members = sums[1:] - sums[torch.as_tensor(np.cumsum(sizes) - sizes, device=bits.device)[owner]] - 1
    if bool(((members >= n) | (quotients > n >> k)).any()):
        raise FormatError("a list of a tile leaves what it chooses from")
    return members, unary_at + (int(ones[-1]) + 1 if total else 0)


def _chosen(listed: Tensor, m: int, inverted: bool) -> Tensor:
    return _listed(listed, m + listed.numel(), True)[0] if inverted else listed


def _climb(facts: Facts, members: Tensor, total: int) -> Tensor:
    """How many bits |step| - 1 of each change has."""
    standing, done = torch.arange(total, device=members.device), 0
    lengths = torch.zeros(total, dtype=torch.int64, device=members.device)
    for level in range(1, facts.shape[1] - LADDER):
        tops, chosen = facts[:, LADDER + level - 1], facts[:, LADDER + level]
        if not tops.any():
            break
        inverted, written = 2 * chosen > tops, np.minimum(chosen, tops - chosen)
        starts = torch.as_tensor(np.cumsum(tops) - tops, device=members.device)
        climbs = torch.as_tensor(inverted, device=members.device)[_owners(tops, members.device)]
        own = members[done : done + int(written.sum())] + starts[_owners(written, members.device)]
        climbs[own] = ~climbs[own]
        standing, done = standing[climbs], done + int(written.sum())
        lengths[standing] = level
    return lengths


def _steps(bits: Tensor, raw_at: int, sign_at: int, lengths: Tensor, kind: Any) -> Tensor:
    widths = (lengths - 1).clamp(min=0)
    at = raw_at + widths.cumsum(0) - widths
    low = torch.where(lengths > 0, torch.ones_like(lengths) << widths, 0)
    for bit in range(int(widths.max()) if widths.numel() else 0):
        wide = widths > bit
        low[wide] |= bits[at[wide] + bit].long() << bit
    negative = bits[sign_at : sign_at + lengths.numel()].bool()
    if bool((low[~negative] == torch.iinfo(kind).max).any()):
        raise FormatError("a step of half the range is written as a positive one")
    return torch.where(negative, ~low, low + 1).to(kind)


def _classes(old: Tensor, scheme: Scheme) -> Tensor:
    """Blocks of the elements' classes; one that no element has fills the last."""
    wide = old if old.element_size() >= 4 else old.int()
    own = (((wide >> scheme.shift) & scheme.mask) - scheme.lowest).clamp(0, CLASSES - 1).byte()
    return torch.nn.functional.pad(own, (0, -old.numel() % BLOCK), value=CLASSES).view(-1, BLOCK)


def _before(blocks: Tensor) -> Tensor:
    """[blocks + 1, classes]: the elements of each class before a block."""
    counts = torch.stack([(blocks == c).sum(1) for c in range(CLASSES)], 1)
    return torch.cat([counts.new_zeros(1, CLASSES), counts.cumsum(0)])


def ranked(old: Tensor, positions: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor, Tensor]:
    """The elements of each class, and of each change its class and its rank; positions may be in any order."""
    blocks = _classes(old, scheme)
    before, within = _before(blocks), torch.arange(BLOCK, device=old.device)
    own, ranks = blocks.view(-1)[positions], torch.empty_like(positions)
    for start in range(0, positions.numel(), AT_ONCE):
        some = slice(start, start + AT_ONCE)
        block, c = positions[some] // BLOCK, own[some]
        left = within < (positions[some] % BLOCK)[:, None]
        ranks[some] = before[block, c.long()] + ((blocks[block] == c[:, None]) & left).sum(1)
    return before[-1], own, ranks


def classify(old: Tensor, positions: Tensor, steps: Tensor, scheme: Scheme) -> tuple[Any, Any, Tensor, Tensor]:
    """As `classes.classify`; the two counts are numpy's."""
    population, own, ranks = ranked(old, positions, scheme)
    order = torch.argsort(own, stable=True)
    changed = torch.bincount(own, minlength=CLASSES).cpu().numpy()
    return population.cpu().numpy(), changed, ranks[order], steps[order]


def locate(old: Tensor, facts: Facts, ranks: Tensor, steps: Tensor, scheme: Scheme) -> tuple[Any, Tensor, Tensor]:
    """As `classes.locate`; the counts are numpy's."""
    blocks = _classes(old, scheme)
    before, own = _before(blocks), _owners(facts[:, CHANGED], old.device)
    if bool((ranks >= before[-1][own]).any()):
        raise WrongBase("a rank beyond its class: these are not the weights that the delta was made from")
    parts, done = [], 0
    for c, m in enumerate(facts[:, CHANGED].tolist()):
        parts.append(torch.searchsorted(before[1:, c].contiguous(), ranks[done : done + m].contiguous(), right=True))
        done += m
    block, positions = torch.cat(parts), torch.empty_like(ranks)
    for start in range(0, ranks.numel(), AT_ONCE):
        some = slice(start, start + AT_ONCE)
        seen = (blocks[block[some]] == own[some][:, None]).cumsum(1)
        local = ranks[some] - before[block[some], own[some]]
        positions[some] = block[some] * BLOCK + (seen <= local[:, None]).sum(1)
    order = torch.argsort(positions)
    return before[-1].cpu().numpy(), positions[order], steps[order]


def live_rows(positions: Tensor, width: int, limit: int) -> Tensor:
    """The rows that hold a change, ascending."""
    return torch.unique_consecutive(positions // width)
