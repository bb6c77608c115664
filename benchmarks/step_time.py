"""Time of one training step: a mask, plain fine-tuning of the same weights, the published algorithm, LoRA, all weights.

    python benchmarks/step_time.py --model FOLDER --layers 4 5 6 7 --batch_size 1 --seq_len 256 --accumulation 4
    python benchmarks/step_time.py --model 8b-shaped --layers 4 5 6 7 --batch_size 1 --seq_len 512 --accumulation 16

Every rival holds its own copy of the model, and the rivals take turns in one process.
"""

import argparse

import rivals
import torch
from harness import DEVICE, about, config_of, in_turn, rows_against, write_rows

from maskft_lab.demo_model import fetch_demo_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Folder of a model, 8b-shaped or tiny-shaped. Default: the demo's.")
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 5, 6, 7])
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--seq_len", type=int, default=256)
    parser.add_argument("--accumulation", type=int, default=4)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--rivals", nargs="+", choices=rivals.NAMES, default=list(rivals.NAMES))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output_file", help="JSON lines to append to.")
    given = parser.parse_args()
    folder = given.model or str(fetch_demo_model())
    generator = torch.Generator().manual_seed(0)
    shape = (given.batch_size, given.seq_len)
    batches = [
        torch.randint(rivals.vocabulary(folder), shape, generator=generator).to(DEVICE)
        for _ in range(given.accumulation)
    ]
    steps = {}
    counts = {}
    for name in given.rivals:
        model, trained = rivals.prepare(name, rivals.load(folder, getattr(torch, given.dtype), DEVICE), given.layers)
        steps[name] = rivals.training_step(model, trained, batches)
        counts[name] = sum(p.numel() for p in trained)
    seconds = in_turn(steps, given.rounds)
    config = config_of(given, "step_time", folder, "rivals")
    rows = rows_against(seconds, "partial" if "partial" in seconds else given.rivals[0])
    write_rows([row | {"num_trained": counts[row["name"]]} | about(**config) for row in rows], given.output_file)


if __name__ == "__main__":
    main()
