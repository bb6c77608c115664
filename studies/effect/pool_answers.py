"""The answers of several seeds' models as one evaluation, problem by problem.

    python studies/effect/pool_answers.py runs/effect/maths/seed?/answers --output_dir runs/effect/maths/answers
    maskft eval --rescore --output_dir runs/effect/maths/answers

Takes what `maskft eval` left for each seed, with models named alike, and writes each seed's answer as a draw of its
own: `maskft eval --rescore` then takes problems as clusters. Models not evaluated for every seed are left out.
"""

import argparse
from pathlib import Path

from maskft.evaluation.samples import (
    PROTOCOL_FILE,
    open_folder,
    read_protocol,
    read_samples,
    sample_folder,
    write_samples,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--output_dir", type=Path, required=True)
    given = parser.parse_args()
    for path in sorted(given.folders[0].glob(f"*/*/{PROTOCOL_FILE}")):
        folders = [folder / path.parent.relative_to(given.folders[0]) for folder in given.folders]
        if not all((folder / PROTOCOL_FILE).exists() for folder in folders):
            continue
        protocols = [read_protocol(folder) for folder in folders]
        pooled = protocols[0] | {"num_samples": len(folders), "weights": [p["weights"] for p in protocols]}
        target = sample_folder(given.output_dir, pooled["model"], pooled["task"])
        open_folder(target, pooled)
        write_samples(
            target, [row | {"draw": draw} for draw, folder in enumerate(folders) for row in read_samples(folder)]
        )


if __name__ == "__main__":
    main()
