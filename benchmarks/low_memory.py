"""Whether `maskft train --low_memory` learns what the usual optimizer learns: losses and flips of both, over seeds.

    python benchmarks/low_memory.py --output_file rows.jsonl --plot_file curves.png

The demo's model is fine-tuned on the demo's sums, and masks of it learn on others, with the published settings and with
the recommended ones. Optimizers beside "usual" (AdamW) run under --low_memory: "adafactor" is its default,
"adamw_torch_8bit" needs torchao.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

from harness import about, config_of, write_rows
from matplotlib.figure import Figure

from maskft.training.arguments import DataArguments, TrainingSettings
from maskft.training.run import run_sft, run_train
from maskft.tuner import MaskConfig
from maskft_lab.demo_model import fetch_demo_model
from maskft_lab.reasoning.sums import build_task

PRESETS = ("paper", "recommended")
USUAL = "usual"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Folder of the model to fine-tune. Default: the demo's.")
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 5, 6, 7])
    parser.add_argument("--optimizers", nargs="+", default=[USUAL, "adafactor"])
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=list(PRESETS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--num_fine_tune", type=int, default=600)
    parser.add_argument("--num_train", type=int, default=600, help="Rows that the masks learn on.")
    parser.add_argument("--num_validation", type=int, default=200)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--output_file", help="JSON lines to append to.")
    parser.add_argument("--plot_file", help="Picture to write.")
    given = parser.parse_args()
    model = given.model or str(fetch_demo_model())
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        for seed in given.seeds:
            folder = Path(temporary) / str(seed)
            _write_data(folder, seed, given)
            config = config_of(given, "low_memory", model) | {"seed": seed}
            before = _fine_tune(model, folder, seed, given)
            for preset in given.presets:
                for optimizer in given.optimizers:
                    found = {"eval_loss_before": before} | _learn(model, folder, preset, optimizer, seed, given)
                    rows.append({"preset": preset, "optimizer": optimizer, "seed": seed} | found | about(**config))
    write_rows(rows, given.output_file)
    if given.plot_file:
        _draw(rows, given.plot_file)


def _write_data(folder: Path, seed: int, given: argparse.Namespace) -> None:
    task = build_task(given.num_fine_tune + given.num_train, given.num_validation, 1, seed)
    splits = {
        "fine_tune": task["train"].take(given.num_fine_tune),
        "train": task["train"].skip(given.num_fine_tune),
        "validation": task["validation"],
    }
    folder.mkdir()
    for name, split in splits.items():
        split.select_columns(["prompt", "completion"]).to_json(folder / f"{name}.jsonl")


def _fine_tune(model: str, folder: Path, seed: int, given: argparse.Namespace) -> float:
    settings = _settings(folder, "fft", seed, given, learning_rate=1e-4, num_train_epochs=2)
    return _eval_loss(run_sft(_data(model, folder, "fine_tune", given), settings))


def _settings(folder: Path, name: str, seed: int, given: argparse.Namespace, **settings: Any) -> TrainingSettings:
    return TrainingSettings(
        output_dir=str(folder / name),
        per_device_train_batch_size=given.batch_size,
        per_device_eval_batch_size=50,
        logging_steps=5,
        save_only_model=True,
        seed=seed,
        max_length=64,
        disable_tqdm=True,
        **settings,
    )


def _data(model: str, folder: Path, split: str, given: argparse.Namespace) -> DataArguments:
    return DataArguments(
        model_name_or_path=model,
        dataset_name=str(folder / f"{split}.jsonl"),
        eval_dataset_name=str(folder / "validation.jsonl"),
        dtype=given.dtype,
    )


def _eval_loss(report: dict[str, Any]) -> float:
    """Of the checkpoint that was kept."""
    return round(min(entry["eval_loss"] for entry in report["log_history"] if "eval_loss" in entry), 4)


def _learn(
    model: str, folder: Path, preset: str, optimizer: str, seed: int, given: argparse.Namespace
) -> dict[str, Any]:
    settings = _settings(
        folder,
        f"{preset}-{optimizer}",
        seed,
        given,
        learning_rate=given.learning_rate,
        num_train_epochs=1,
        low_memory=optimizer != USUAL,
        optim=None if optimizer == USUAL else optimizer,
    )
    mask = MaskConfig.preset(
        preset,
        task_type="CAUSAL_LM",
        layers_to_transform=given.layers,
        seed=seed,
        reference_model_name_or_path=model if preset == "recommended" else None,
    )
    report = run_train(_data(str(folder / "fft"), folder, "train", given), settings, mask)
    log = [entry for entry in report["log_history"] if "flips" in entry]
    third = max(len(log) // 3, 1)
    return {
        "first_loss": round(sum(e["loss"] for e in log[:third]) / third, 4),
        "last_loss": round(sum(e["loss"] for e in log[-third:]) / third, 4),
        "eval_loss": _eval_loss(report),
        "flips": sum(entry["flips"] for entry in log),
        "kept_share": round(report["mask"]["kept_share"], 5),
        "seconds": report["seconds"],
        "curve": [{key: entry[key] for key in ("step", "loss", "flips") if key in entry} for entry in log],
    }


def _draw(rows: list[dict[str, Any]], path: str) -> None:
    figure = Figure(figsize=(9, 6), layout="constrained")
    presets = list(dict.fromkeys(row["preset"] for row in rows))
    for axes, preset in zip(figure.subplots(len(presets), 2, squeeze=False), presets, strict=True):
        for row in rows:
            if row["preset"] != preset:
                continue
            curve = row["curve"]
            label = f"{row['optimizer']}, seed {row['seed']}"
            for place, key in zip(axes, ("loss", "flips"), strict=True):
                place.plot([5 * (i + 1) for i in range(len(curve))], [entry[key] for entry in curve], label=label)
                place.set_title(f"{preset}: {key}")
        axes[1].set_yscale("log")
        axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
