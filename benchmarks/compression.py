"""Random masks through the coder: bits a weight against their entropy, and the time to code and to read them.

python benchmarks/compression.py --output_file compression.jsonl
"""

import argparse
import math
import time

import torch
from harness import about, write_rows

from maskft.masks import pack_mask
from maskft.storage.coding import decode_mask, encode_mask

SHAPES = {"q_proj": (4096, 4096), "k_proj": (1024, 4096), "gate_proj": (14336, 4096)}  # of Llama 8B


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--densities", type=float, nargs="+", default=[0.5, 0.9, 0.99, 0.9996, 0.9999, 0.99999])
    parser.add_argument("--output_file", help="JSON lines to append to.")
    given = parser.parse_args()
    rows = []
    for density in given.densities:
        num_weights, entropy, bits, seconds = 0, 0.0, 0, [0.0, 0.0]
        generator = torch.Generator().manual_seed(0)
        for name, shape in SHAPES.items():
            mask = torch.rand(shape, generator=generator) < density
            num_weights += mask.numel()
            entropy += mask.numel() * binary_entropy(float(mask.double().mean()))
            packed = pack_mask(mask)
            started = time.process_time()
            coded = encode_mask(packed)
            coded_at = time.process_time()
            decoded = decode_mask(coded, name)
            seconds = [seconds[0] + coded_at - started, seconds[1] + time.process_time() - coded_at]
            assert torch.equal(decoded, packed)
            bits += 8 * coded.numel()
        row = {"density": density, "entropy": entropy / num_weights, "coded": bits / num_weights}
        row |= {"percent_over": 100 * (bits / entropy - 1)}
        row |= {
            f"ns_to_{what}": 1e9 * spent / num_weights for what, spent in zip(("code", "read"), seconds, strict=True)
        }
        rounded = {key: float(f"{value:.6g}") for key, value in row.items()}
        rows.append(rounded | {"num_weights": num_weights} | about(benchmark="compression", density=density))
    write_rows(rows, given.output_file)


def binary_entropy(share: float) -> float:
    """Bits of a draw that is one with probability `share`."""
    return -sum(p * math.log2(p) for p in (share, 1 - share) if p)


if __name__ == "__main__":
    main()
