"""What a run of `maskft sft`, `train` or `crossfit` leaves beside its weights: report.json, report.html, model card."""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from maskft.report import Page, PageTable, training_curves, write_html
from maskft.storage.files import atomic_write_text

_MASK_CARD = """# A mask for {model}

It keeps {kept:.3f} % of {num_weights:,} weights of the base model{rest}
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
_LEFT_OUT = " and leaves out the rest; no weight is changed."
_GONE_BACK = """. The others go back to their values in the reference model,
{reference}, which loading the mask needs too."""
_RESULT = """Checkpoint: {best}. Trained on {num_train} rows, validated on {num_validation}.
"""
_CROSSFIT_RESULT = """Cross-fitted on {num_train} rows and judged on {num_validation} validation rows.
"""
_FILES = """Settings, versions, data hashes and every logged value are in `report.json`, the curves in `report.html`.
"""


def write_reports(folder: Path, report: dict[str, Any], *, is_written: bool = True) -> None:
    """Write `report.json`, `report.html` and `README.md` of a run into `folder`; `is_written`: so is its result."""
    atomic_write_text(folder / "report.json", json.dumps(report, indent=2) + "\n")
    write_html(folder / "report.html", _page(report))
    atomic_write_text(folder / "README.md", str(_card(report, is_written)))


def _page(report: dict[str, Any]) -> Page:
    name = f"maskft {report['command']}: {report['model_name_or_path']}"
    rows = [
        ("training rows", f"{report['data']['train']['n']}"),
        ("validation rows", f"{report['data']['validation']['n']}"),
        ("time", f"{report['seconds']:.0f} s on {report['machine']}"),
    ]
    if "mask" in report:
        mask = report["mask"]
        rows.insert(0, ("weights kept", f"{100 * mask['kept_share']:.3f} % of {mask['num_weights']:,}"))
        if "reachable_share" in mask:
            rows.insert(1, ("weights that could flip", f"at most {100 * mask['reachable_share']:.2f} %"))
    if "verdict" in report:
        rows.insert(0, ("verdict", report["verdict"]["sentence"]))
    if report["command"] != "crossfit":
        rows.insert(0, ("checkpoint", _best(report)))
    if compared := comparison(report):
        rows.insert(1, ("mask", compared))
    settings = {key: value for key, value in report.items() if key != "log_history"}
    return Page(
        title=name,
        caption=_caption(report),
        tables=[PageTable(("", "result"), rows)],
        curves=training_curves(_logs(report), is_nll=_is_nll(report)),
        details={"Settings, versions and data": settings},
    )


def _caption(report: dict[str, Any]) -> str:
    if report["command"] == "crossfit":
        told = report["settings"]["crossfit"]
        return (
            f"{told['num_repeats']} x cross-fitting of {told['num_folds']} folds over {told['num_fine_tunings']} "
            "fine-tuning(s); validation rows chose none of the scores, but may have chosen the checkpoints of "
            "fine-tunings, those of the folds too."
        )
    if "averaged" in report:
        return "The average of runs with other seeds; validation chose their checkpoints, so no value is a test result."
    if report["best"]["value"] is None:
        return "One run, one seed; no checkpoint was chosen."
    return "One run, one seed; validation chose the checkpoint, so its value is no test result."


def _best(report: dict[str, Any]) -> str:
    if "averaged" in report:
        each = "; ".join(_score(run["best"], _is_nll(report)) for run in report["averaged"])
        return f"of {len(report['averaged'])} fine-tunings, which are averaged: {each}"
    best = report["best"]
    if best["value"] is not None:
        return f"the best, {_score(best, _is_nll(report))}"
    name = best["metric"]
    last = next((entry for entry in reversed(report["log_history"]) if name in entry), None)
    if last is None:
        return "the last, not chosen by validation"
    score = _score({"metric": name, "value": last[name], "step": last["step"]}, _is_nll(report))
    return f"the last, not chosen by validation (last evaluation: {score})"


def comparison(report: dict[str, Any]) -> str:
    """The validation losses without the mask and with it; empty where one of them is not known."""
    best, evaluations = report["best"], [entry for entry in report["log_history"] if "eval_loss" in entry]
    if "without_mask" not in report or not evaluations:
        return ""
    text = f"Validation loss without the mask {report['without_mask']['eval_loss']:.4f}, with it "
    if best["value"] is None:
        return f"{text}{evaluations[-1]['eval_loss']:.4f} at the last evaluation."
    chosen = next(entry for entry in reversed(evaluations) if entry["step"] == best["step"])
    return f"{text}{chosen['eval_loss']:.4f}, which is optimistic: validation chose the checkpoint."


def _logs(report: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """What is drawn: the log, and the loss without the mask as a line from its first evaluation to its last."""
    log = report["log_history"]
    steps = [entry["step"] for entry in log if "eval_loss" in entry]
    if "without_mask" not in report or not steps:
        return {report["command"]: log}
    ends = [report["without_mask"] | {"step": step} for step in (steps[0], steps[-1])]
    return {"with the mask": log, "without the mask": ends}


def _score(best: dict[str, Any], is_nll: bool) -> str:
    if best["value"] is None:
        return "not chosen by validation"
    unit = " (NLL per token in nats, mean over batches)" if best["metric"] == "eval_loss" and is_nll else ""
    return f"{best['metric']} {best['value']:.4f}{unit} at step {best['step']}"


def _is_nll(report: dict[str, Any]) -> bool:
    """Whether the loss is the negative log-likelihood of the tokens, and nothing else."""
    settings = report["settings"]
    is_plain = not settings.get("label_smoothing_factor") and not settings.get("temperature_scaling")
    return is_plain and settings.get("loss_type", "nll") in ("nll", "chunked_nll")


def _reference(report: dict[str, Any]) -> str | None:
    """The model that a mask puts in the places it leaves out, where that is not zero."""
    settings = report["settings"]
    if report["command"] == "crossfit":
        return str(settings["data"]["model_name_or_path"])
    name: str | None = settings["mask"]["reference_model_name_or_path"]
    return name


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
    reference = _reference(report) if mask else None
    result = _CROSSFIT_RESULT if report["command"] == "crossfit" else _RESULT
    text = head.replace("{rest}", _GONE_BACK if reference else _LEFT_OUT)
    told = (verdict["sentence"] if verdict else "", comparison(report))
    text += "".join(f"{sentence}\n\n" for sentence in told if sentence) + result + _FILES
    body = text.format(
        reference=reference,
        model=report["model_name_or_path"],
        version=report["versions"]["maskft"],
        kept=100 * mask["kept_share"] if mask else None,
        num_weights=mask["num_weights"] if mask else None,
        best=_best(report),
        num_train=report["data"]["train"]["n"],
        num_validation=report["data"]["validation"]["n"],
    )
    return ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n{body}", ignore_metadata_errors=True)
