"""What a run of `maskft sft`, `train` or `crossfit` leaves beside its weights: report.json, report.html, model card."""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from maskft.checkpoints.files import atomic_write_text
from maskft.report import Page, PageTable, training_curves, write_html

_MASK_CARD = """# A mask for {model}

It keeps {kept:.3f} % of {num_weights:,} weights of the base model and leaves out the rest; no weight is changed.
Learned with maskft {version} by Mask Fine-Tuning (arXiv 2503.22764).

```python
import torch
import maskft  # makes the method known to PEFT
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("PATH_OF_THIS_ADAPTER", dtype=torch.float32)
```

"""
_NO_MASK_CARD = """# No mask for {model}

A mask was learned with maskft {version} and showed no gain, so none was written.

"""
_MODEL_CARD = """# {model}, fine-tuned

All weights were fine-tuned with maskft {version}.

"""
_RESULT = """Best checkpoint on {num_validation} validation rows: {best}. Trained on {num_train} rows.
Settings, versions, data hashes and every logged value are in `report.json`, the curves in `report.html`.
"""


def write_reports(folder: Path, report: dict[str, Any], *, is_written: bool = True) -> None:
    """Write `report.json`, `report.html` and `README.md` of a run into `folder`; `is_written`: so is its result."""
    atomic_write_text(folder / "report.json", json.dumps(report, indent=2) + "\n")
    write_html(folder / "report.html", _page(report))
    atomic_write_text(folder / "README.md", str(_card(report, is_written)))


def _page(report: dict[str, Any]) -> Page:
    name = f"maskft {report['command']}: {report['model_name_or_path']}"
    rows = [
        ("best checkpoint", _best(report)),
        ("training rows", f"{report['data']['train']['n']}"),
        ("validation rows", f"{report['data']['validation']['n']}"),
        ("time", f"{report['seconds']:.0f} s on {report['machine']}"),
    ]
    if "mask" in report:
        mask = report["mask"]
        rows.insert(1, ("weights kept", f"{100 * mask['kept_share']:.3f} % of {mask['num_weights']:,}"))
        if "reachable_share" in mask:
            rows.insert(2, ("weights that could flip", f"at most {100 * mask['reachable_share']:.2f} %"))
    if "verdict" in report:
        rows.insert(1, ("verdict", report["verdict"]["sentence"]))
    settings = {key: value for key, value in report.items() if key != "log_history"}
    return Page(
        title=name,
        caption="One run, one seed; validation chose the checkpoint, so its value is no test result.",
        tables=[PageTable(("", "result"), rows)],
        curves=training_curves({report["command"]: report["log_history"]}),
        details={"Settings, versions and data": settings},
    )


def _best(report: dict[str, Any]) -> str:
    if "averaged" in report:
        each = "; ".join(map(_best, report["averaged"]))
        return f"of {len(report['averaged'])} fine-tunings, which are averaged: {each}"
    best = report["best"]
    if best["value"] is None:
        return "not chosen by validation"
    unit = " nats per token" if best["metric"] == "eval_loss" else ""
    return f"{best['metric']} {best['value']:.4f}{unit} at step {best['step']}"


def _card(report: dict[str, Any], is_written: bool) -> ModelCard:
    mask = report.get("mask")
    metadata = ModelCardData(
        base_model=report["model_name_or_path"],
        library_name="peft" if mask else "transformers",
        pipeline_tag="text-generation",
        tags=["maskft", "mask-fine-tuning"] if mask else ["maskft", "sft"],
    )
    verdict = report.get("verdict")
    if mask and not is_written:
        head = _NO_MASK_CARD
    else:
        head = _MASK_CARD if mask else _MODEL_CARD
    text = head + (f"{verdict['sentence']}\n\n" if verdict else "") + _RESULT
    body = text.format(
        model=report["model_name_or_path"],
        version=report["versions"]["maskft"],
        kept=100 * mask["kept_share"] if mask else None,
        num_weights=mask["num_weights"] if mask else None,
        best=_best(report),
        num_train=report["data"]["train"]["n"],
        num_validation=report["data"]["validation"]["n"],
    )
    return ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n{body}", ignore_metadata_errors=True)
