"""Counts in the arrays that former versions stored."""

import numpy as np

from transforms.ranges.counts import Counts


def rows_of(counts: Counts) -> dict[str, np.ndarray]:
    """Histograms as the rows of a compressed sparse matrix, `counts` in the narrowest type."""
    dense = counts.histogram
    row, bins = dense.nonzero()
    starts = [int((row < each).sum()) for each in range(len(dense) + 1)]
    numbers = dense[row, bins]
    return {
        "indptr": np.array(starts, np.uint32),
        "bins": bins.astype(np.uint16),
        "counts": numbers.astype(np.min_scalar_type(int(numbers.max(initial=0)))),
        "maximum": counts.maximum,
        "stretches": counts.stretches,
        "total": np.array([counts.total]),
    }
