"""Averages of fine-tunings: models of the same start and rows, and other seeds, whose weights are averaged."""

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel

from maskft.adapters.model_files import load_model, read_tokenizer
from maskft.adapters.model_layout import read_config
from maskft.storage.json_text import read_object
from maskft.training.report import write_result


@torch.no_grad()
def average_models(folders: Sequence[Path]) -> PreTrainedModel:
    """The mean in float32 of the models in `folders` ("uniform soup", arXiv 2203.05482), in the dtype of the first.

    Buffers are those of the first.
    """
    model = load_model(str(folders[0]), "float32")
    # By parameter, not by entry of the state dict, which names a tied weight twice.
    weights = dict(model.named_parameters())
    for number, folder in enumerate(folders[1:], start=2):
        for name, weight in load_model(str(folder), "float32").named_parameters():
            weights[name].lerp_(weight, 1 / number)
    averaged: PreTrainedModel = model.to(read_config(str(folders[0])).dtype)
    return averaged


def save_average(fine_tunings: Sequence[Path], output_dir: Path) -> None:
    """Write the average of the models that `maskft sft` left to `output_dir`, with a report that tells of each."""
    reports = [read_object(folder / "report.json", "remove that folder and start again") for folder in fine_tunings]
    report = reports[0] | {
        "best": {"metric": reports[0]["best"]["metric"], "value": None, "step": None},
        "seconds": round(sum(each["seconds"] for each in reports), 1),
        "log_history": [],
        "averaged": [{"seed": each["settings"]["seed"], "best": each["best"]} for each in reports],
    }
    write_result(output_dir, report, average_models(fine_tunings), read_tokenizer(str(fine_tunings[0])))
