"""What a mask is, in plain Python: sort by score and position, and keep the first."""

import hypothesis.strategies as st
import torch
from hypothesis.extra.numpy import arrays
from torch import Tensor

from maskft.masks import num_kept

# Few distinct values, so that ties are common; both zeros and infinities are among them.
TIE_PRONE = st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, 2.0, -2.0, 1e-30, 1e-45, float("inf"), float("-inf")])
FLOATS = st.one_of(TIE_PRONE, st.floats(width=32, allow_nan=False))
SHAPES = st.tuples(st.integers(1, 7), st.integers(1, 9))
MATRICES = arrays("float32", SHAPES, elements=FLOATS).map(torch.from_numpy)


@st.composite
def matrices_of_one_dtype(draw) -> list[Tensor]:
    """One to four tensors of scores."""
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]))
    if dtype == torch.float64:
        wide = arrays("float64", SHAPES, elements=st.one_of(TIE_PRONE, st.floats(allow_nan=False)))
        return draw(st.lists(wide.map(torch.from_numpy), min_size=1, max_size=4))
    return [scores.to(dtype) for scores in draw(st.lists(MATRICES, min_size=1, max_size=4))]


def top(scores: list[Tensor], k: int, score_transform: str) -> list[Tensor]:
    """Masks of the k first of all (score, position), the largest score and the earliest position first."""
    flat = torch.cat([s.reshape(-1) for s in scores]).tolist()
    ranked = [abs(v) for v in flat] if score_transform == "abs" else flat
    order = sorted(range(len(ranked)), key=lambda i: (-ranked[i], i))
    kept = torch.zeros(len(flat), dtype=torch.bool)
    kept[order[:k]] = True
    return [part.view(s.shape) for part, s in zip(kept.split([s.numel() for s in scores]), scores, strict=True)]


def choose(
    scores: list[Tensor], *, selection: str, density: float = 0.9, threshold: float = 0.0, score_transform: str = "abs"
) -> list[Tensor]:
    """The masks that `maskft.masks.select` has to make."""
    if selection == "threshold":
        ranked = [s.abs() if score_transform == "abs" else s for s in scores]
        reach = [[value >= threshold for value in s.reshape(-1).tolist()] for s in ranked]
        return [torch.tensor(each).view(s.shape) for each, s in zip(reach, scores, strict=True)]
    pools = [scores] if selection == "global_topk" else [[s] for s in scores]
    ks = [num_kept(sum(s.numel() for s in pool), density) for pool in pools]
    return [mask for pool, k in zip(pools, ks, strict=True) for mask in top(pool, k, score_transform)]
