"""``aiockpt diff``: how far each tensor moved between two steps; every byte that is read is verified."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import msgspec

from aiockpt.cli.compare import Comparison, Difference, Form, FormChange, ValueChange, compare
from aiockpt.cli.contents import nbytes_of_entry, open_of_rank_0, place_of, refuse_idle
from aiockpt.cli.diff_screen import show
from aiockpt.cli.listing import find, read_listing, readable
from aiockpt.cli.screen import console, print_json, reading_bar
from aiockpt.restoring.selection import Selection
from aiockpt.storage.readers import OpenCheckpoint

__all__ = ["Report", "run"]


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """How two steps of a run differ."""

    run: str
    a: int
    b: int
    tensors: list[Difference]
    """Those that have not the same bytes, the furthest apart first."""
    added: list[Form]
    removed: list[Form]
    changed: list[FormChange]
    """What has another dtype or shape, or is another kind of thing."""
    values: list[ValueChange]
    metadata: list[ValueChange]
    """Only where everything was compared."""
    equal_tensors: int
    equal_values: int


def run(args: argparse.Namespace) -> int:
    """Compare two steps; 0 whether they differ or not, or an error."""
    screen = None if args.json else console()
    names = Selection(args.tensors)
    listing = read_listing(args.run)
    entries = [readable(find(listing, step)) for step in (args.a, args.b)]
    with open_of_rank_0(entries[0].path) as a, open_of_rank_0(entries[1].path) as b:
        refuse_idle(names, a.manifest, b.manifest)
        comparison = compare(a.manifest, b.manifest, names)
        total = 2 * sum(nbytes_of_entry(a.manifest, pair.a) for pair in comparison.pairs)
        with nullcontext() if screen is None else reading_bar(f"steps {args.a} and {args.b}", total) as advance:
            differences = _differences(comparison, a, b, advance)
    report = Report(
        run=listing.run,
        a=args.a,
        b=args.b,
        tensors=differences,
        added=comparison.added,
        removed=comparison.removed,
        changed=comparison.changed,
        values=comparison.values,
        metadata=comparison.metadata,
        equal_tensors=len(comparison.pairs) - len(differences),
        equal_values=comparison.equal_values,
    )
    if screen is None:
        print_json(report)
    else:
        show(screen, report, args.limit)
    return 0


def _differences(
    comparison: Comparison, a: OpenCheckpoint, b: OpenCheckpoint, advance: Callable[[int], None] | None
) -> list[Difference]:
    """Return which of the pairs do not have the same bytes, the furthest apart first."""
    if not comparison.pairs:
        return []
    import torch  # not before the arguments are known to be good

    from aiockpt.cli.compare_tensors import Reader, difference

    # On parts so small torch's threads spend three times the work on waiting for each other (measured on two cores).
    torch.set_num_threads(1)
    # In the order of the files each block is read once.
    pairs = sorted(comparison.pairs, key=lambda pair: place_of(a, pair.a))
    left, right = Reader(a), Reader(b)
    with ThreadPoolExecutor(1, thread_name_prefix="aiockpt-diff") as pool:
        found = [difference(pair, left, right, pool, advance) for pair in pairs]
    differing = [item for item in found if item is not None]
    # One that became NaN, or ceased to be, is further away than any number.
    return sorted(differing, key=lambda item: (item.nan_a == item.nan_b, -item.relative, -item.max_abs, item.name))
