"""k-means over the vectors of steps, plain and with clusters of nearly equal size."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from memreason.core.stages import DataRecipe

__all__ = ["fit_balanced", "fit_centres", "nearest"]

ROUNDS, BIDS = 10, 200  # of the balanced one: how often centres move, and how often prices do for each
Arrays = dict[str, NDArray[np.float32]]


def fit_centres(vectors: Any, data: DataRecipe) -> Arrays:
    """Centres of k-means, (types, features), the best of ten starts. The greatest cluster comes first."""
    from sklearn.cluster import KMeans

    found = KMeans(data.n_types, n_init=10, random_state=data.seed).fit(vectors)
    order = np.argsort(-np.bincount(found.labels_, minlength=data.n_types), kind="stable")
    return {"centres": found.cluster_centers_[order].astype(np.float32)}


def fit_balanced(vectors: Any, data: DataRecipe) -> Arrays:
    """Centres and a price for each, (types,), at which about equally many vectors choose it.

    A vector belongs where squared distance and price together are least. A price rises while too many choose its
    centre (the dual of the assignment problem, by subgradient), so that new vectors are told by the same rule.
    """
    arrays = fit_centres(vectors, data)
    for _ in range(ROUNDS):
        arrays["prices"] = _prices(_squares(vectors, arrays["centres"]))
        owner = nearest(vectors, arrays)
        own = [vectors[owner == n] for n in range(data.n_types)]
        moved = [one.mean(0) if len(one) else centre for one, centre in zip(own, arrays["centres"], strict=True)]
        arrays["centres"] = np.stack(moved).astype(np.float32)
    return arrays | {"prices": _prices(_squares(vectors, arrays["centres"]))}


def _prices(squares: NDArray[np.float32]) -> NDArray[np.float32]:
    """(vectors, types) -> (types,): of all that were tried those whose greatest cluster is smallest."""
    count, types = squares.shape
    prices = np.zeros(types, np.float32)
    best, least = prices, count + 1
    for bid in range(BIDS):
        sizes = np.bincount((squares + prices).argmin(axis=1), minlength=types)
        if sizes.max() < least:
            best, least = prices.copy(), sizes.max()
        prices += float(squares.std()) * (sizes / count - 1 / types) / np.sqrt(1 + bid)
    return best


def nearest(vectors: Any, arrays: Arrays) -> NDArray[np.intp]:
    """The type of each vector: (n, features) -> (n,)."""
    types: NDArray[np.intp] = (_squares(vectors, arrays["centres"]) + arrays.get("prices", 0)).argmin(axis=1)
    return types


def _squares(vectors: Any, centres: NDArray[np.float32]) -> NDArray[np.float32]:
    from sklearn.metrics.pairwise import euclidean_distances

    found: NDArray[np.float32] = euclidean_distances(vectors, centres, squared=True)
    return found
