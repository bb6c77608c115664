"""Choosing a mask: the packed masks against one read of the scores and against a sort.

python benchmarks/selection.py --sizes 1e5 1e6 1e7 1e8
"""

import argparse

import torch
from harness import DEVICE, about, in_turn, rows_against, write_rows

from maskft.masks import num_kept
from maskft.masks.selection import select_packed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=float, nargs="+", default=[1e5, 1e6, 1e7, 1e8])
    parser.add_argument("--density", type=float, default=0.9)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output_file", help="JSON lines to append to.")
    given = parser.parse_args()
    rows = []
    for size in map(int, given.sizes):
        scores = torch.randn(size // 200, 200, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(DEVICE)
        parts = list(scores.chunk(28))
        k = num_kept(scores.numel(), given.density)

        def choose(tensors: list[torch.Tensor], selection: str) -> None:
            select_packed(tensors, selection=selection, density=given.density)  # type: ignore[arg-type]

        runs = {
            "read": lambda scores=scores: scores.sum(),
            "mask, topk of 28": lambda parts=parts: choose(parts, "topk"),
            "mask, global_topk of 28": lambda parts=parts: choose(parts, "global_topk"),
            "kthvalue": lambda scores=scores, k=k: scores.abs().flatten().kthvalue(scores.numel() - k + 1),
            "sort": lambda scores=scores: scores.abs().flatten().sort(),
        }
        seconds = in_turn(runs, given.rounds)
        config = {"benchmark": "selection", "density": given.density, "size": size}
        rows += [{"size": size} | row | about(**config) for row in rows_against(seconds, "read")]
    write_rows(rows, given.output_file)


if __name__ == "__main__":
    main()
