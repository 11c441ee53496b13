"""Remains of failed writes: batches that are in a file, and again in the next one."""

from collections.abc import Sequence
from itertools import pairwise

from producer.spool.files import SpoolFile


def exclude_remains(files: Sequence[SpoolFile], acked: int, pending: int) -> None:
    """Leave out what files beside a gap hold beyond the `pending` events.

    A write may have failed and reached the disk nevertheless. If the next file, which has its events, is discarded,
    only their number shows that they were, too.
    """
    held = sum(max(0, file.end - max(file.base, acked)) for file in files if not file.damaged)
    for file, following in pairwise(files):
        if held > pending and file.end < following.base and not file.damaged:
            cut = min(held - pending, file.end - file.base)
            file.end -= cut
            held -= cut
