"""Two answers to everything: does a model still tell them apart, or has only its threshold moved?"""

import numpy as np
from scipy.stats import rankdata


def placements(odds: np.ndarray, positive: np.ndarray) -> np.ndarray:
    """The area under the ROC curve as a mean over items, so that it is paired, pooled and tested like any score.

    An item's placement is the share of the other class that it is ranked on the right side of (ties count half); the
    mean of either class is the area, and the spread of both gives its standard error (DeLong et al. 1988).

    Args:
        odds: (items,) log-odds of the positive answer.
        positive: (items,) whether it is the right one.

    Returns:
        (items,) numbers whose mean is the area, and whose variance over the items is that of the area's estimate.
    """
    counts = np.where(positive, positive.sum(), (~positive).sum())
    within = np.empty(len(odds))
    for one in (positive, ~positive):
        within[one] = rankdata(odds[one])
    above = (rankdata(odds) - within) / (len(odds) - counts)  # share of the other class below an item
    placed = np.where(positive, above, 1 - above)
    area = placed[positive].mean()
    return area + (placed - area) * len(odds) / counts


def gives(odds: np.ndarray, before: np.ndarray) -> np.ndarray:
    """(items,) whether each was given the answer that the unedited model gives more often, by the log-odds of both.

    The answer is the unedited model's, so that a threshold which moves past the middle still reads as a move.
    """
    return ((odds > 0) == (2 * (before > 0).sum() >= len(before))).astype(float)
