"""Whether a mask's lower loss is more than a cooler head: best FFT and masks, each at its own best temperature.

    python studies/effect/temperature.py --config studies/effect/maths.yaml --output_dir runs/effect/maths
    python studies/effect/temperature.py --config studies/effect/sums.yaml --output_dir runs/effect-sums/MODEL/sums

For each seed's folder of `compare.py`, or of `maskft study`: logits divided by a temperature that the validation rows
choose (Guo et al., arXiv 1706.04599), for the best FFT and for the masks over it; test NLL at temperature 1 and at that
one. Writes `temperature/seedN.json` beside those folders and prints the differences, with 95 % intervals over rows.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import compare
import numpy as np
import torch
import yaml
from peft import PeftModel
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from maskft.evaluation.statistics import paired_ratio_difference

TEMPERATURES = [round(0.9 + 0.05 * i, 2) for i in range(23)]
MASKS = ("crossfit", "crossfit-vote")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    given = parser.parse_args()
    content = yaml.safe_load(given.config.read_text())
    base, rows = compare.base_and_rows(content, str(given.config))
    found: dict[str, list[dict[str, Any]]] = {}
    for seed in given.seeds:
        folder = given.output_dir / f"seed{seed}"
        path = given.output_dir / "temperature" / f"seed{seed}.json"
        path.parent.mkdir(exist_ok=True)
        if not path.exists():
            names = [name for name in ("fft", *MASKS) if list(folder.glob(f"{name}.json")) or (folder / name).exists()]
            path.write_text(json.dumps({name: measure(folder, name, base, rows, seed) for name in names}))
        for name, result in json.loads(path.read_text()).items():
            found.setdefault(name, []).append(result)
    for name in [name for name in MASKS if name in found]:
        for at in ("at_1", "at_best"):
            old, new = (np.array([r[at] for r in found[which]]) for which in ("fft", name))
            i = paired_ratio_difference(old, new, np.array([r["num_tokens"] for r in found["fft"]]))
            print(f"{name:20s} minus best FFT, {at}: {i.estimate:+.4f} [{i.low:+.4f}, {i.high:+.4f}]")
    for name, results in found.items():
        nll = [[sum(r[at]) / sum(r["num_tokens"]) for r in results] for at in ("at_1", "at_best")]
        print(f"{name:20s} T {[r['temperature'] for r in results]} NLL {np.mean(nll[0]):.4f} -> {np.mean(nll[1]):.4f}")


def measure(folder: Path, name: str, base: str, rows: dict[str, compare.Rows], seed: int) -> dict[str, Any]:
    """Test NLL sums of a run's model at temperature 1 and at the best one on validation."""
    is_study = (folder / "fft" / "model").exists()
    settings = {} if is_study else json.loads((folder / f"{name}.json").read_text())["settings"]
    run = compare.Run(compare.DEFAULTS | settings, base, folder, rows, seed, {})
    run.model = AutoModelForCausalLM.from_pretrained(
        folder / ("fft/model" if is_study else "fft-model"), dtype=torch.float32, attn_implementation="eager"
    ).to(compare.DEVICE)
    if name != "fft" and is_study:
        run.model = PeftModel.from_pretrained(run.model, folder / name / "adapter")
    elif name != "fft":
        run.mask()
    run.model.eval()
    sums, _ = at_temperatures(run, rows["validation"], TEMPERATURES)
    best = TEMPERATURES[int(sums.sum(0).argmin())]
    sums, num_tokens = at_temperatures(run, rows["test"], [1.0, best])
    return {
        "temperature": best,
        "at_1": sums[:, 0].round(4).tolist(),
        "at_best": sums[:, 1].round(4).tolist(),
        "num_tokens": num_tokens.tolist(),
    }


@torch.no_grad()
def at_temperatures(run: compare.Run, rows: compare.Rows, temperatures: list[float]) -> tuple[np.ndarray, np.ndarray]:
    """NLL sums (rows, temperatures) and numbers of tokens (rows,)."""
    sums, num_tokens = np.zeros((len(rows), len(temperatures))), np.zeros(len(rows), dtype=np.int64)
    for place, row in enumerate(rows):
        logits, targets, at = run.scored([row])
        for i, temperature in enumerate(temperatures):
            sums[place, i] = float(F.cross_entropy(logits / temperature, targets, reduction="sum"))
        num_tokens[place] = int(at.sum())
    return sums, num_tokens


if __name__ == "__main__":
    main()
