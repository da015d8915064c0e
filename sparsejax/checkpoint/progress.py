"""A progress bar over the bytes of a model's parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from sparsejax.checkpoint.mapping import Group


def group_bytes(group: Group, dtypes: Mapping[tuple[str, ...], np.dtype]) -> int:
    """Size of a group's parameters in the given types (by parameter path)."""
    return sum(parameter.size * dtypes[parameter.path].itemsize for parameter in group.parameters)


def progress_bar(
    description: str, groups: Sequence[Group], dtypes: Mapping[tuple[str, ...], np.dtype], *, shown: bool
) -> tqdm[Any]:
    """A bar that is full when all groups have been moved; nothing is printed unless `shown`."""
    total = sum(group_bytes(group, dtypes) for group in groups)
    return tqdm(total=total, unit="B", unit_scale=True, unit_divisor=1024, desc=description, disable=not shown)
