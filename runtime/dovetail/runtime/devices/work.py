"""What a graph is for. This module imports no engine."""

from __future__ import annotations

from typing import NamedTuple

CPU_ALONE = "use --drafter-device cpu"  # the remedy of a drafter for a device that does not fit


class Work(NamedTuple):
    """What a graph computes for a user, in the words of errors."""

    name: str  # such as "the drafter"
    again: str  # the remedy for a faulty file
    off: str  # the remedy for a device that does not fit
    without: str  # the remedy for a call that fails
    less: str  # one of the remedies for a lack of memory
