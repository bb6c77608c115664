"""What a run of `maskft sft`, `train` or `crossfit` leaves beside its weights: report.json, report.html, model card."""

import json
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from huggingface_hub import ModelCard, ModelCardData
from transformers import PreTrainedTokenizerBase

from maskft.adapters.read import check_saved
from maskft.data.rows import count_and_hash
from maskft.report import Page, PageTable, training_curves, write_html
from maskft.storage.environment import machine, versions
from maskft.storage.files import atomic_folder, atomic_write_text, disk_errors
from maskft.storage.json_text import plain

_CARD = Path(__file__).with_name("card.md")


def begin_report(
    command: str,
    model: str,
    settings: dict[str, Any],
    rows: dict[str, Dataset],
    found: dict[str, dict[str, int]] | None = None,
) -> dict[str, Any]:
    """What a report says of a run before it begins.

    Args:
        rows: those it trains and validates on, by those names.
        found: what was found in the data sets that they come from, see :class:`maskft.data.rows.Reader`.
    """
    return {
        "command": command,
        "model_name_or_path": model,
        "settings": plain(settings),
        "versions": versions(),
        "machine": machine(),
        "data": {name: count_and_hash(of) for name, of in rows.items()},
        "data_sets": found or {},
    }


def write_result(
    output_dir: Path,
    report: dict[str, Any],
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    *,
    masks: dict[str, torch.Tensor] | None = None,
    weights: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write model or adapter, tokenizer and reports, each under its name only when all are complete.

    Args:
        masks: those that the adapter's file is read back for.
        weights: the state dict to save. Default: the model's own.
    """
    with disk_errors(f"write the result in {output_dir}"), atomic_folder(output_dir) as folder:
        model.save_pretrained(folder, state_dict=weights)
        if masks is not None:
            check_saved(folder, masks)
        tokenizer.save_pretrained(folder)
        write_reports(folder, report)


def write_reports(folder: Path, report: dict[str, Any], *, is_written: bool = True) -> None:
    """Write `report.json`, `report.html` and `README.md` of a run into `folder`; `is_written`: so is its result."""
    atomic_write_text(folder / "report.json", json.dumps(report, indent=2) + "\n")
    write_html(folder / "report.html", _page(report))
    atomic_write_text(folder / "README.md", str(_card(report, is_written)))


def _page(report: dict[str, Any]) -> Page:
    mask, num_rows = report.get("mask", {}), {name: of["n"] for name, of in report["data"].items()}
    rows = {
        "verdict": report.get("verdict", {}).get("sentence"),
        "checkpoint": None if report["command"] == "crossfit" else _best(report),
        "mask": comparison(report),
        "weights kept": mask and f"{100 * mask['kept_share']:.3f} % of {mask['num_weights']:,}",
        "weights that could flip": "reachable_share" in mask and f"at most {100 * mask['reachable_share']:.2f} %",
        "training rows": str(num_rows["train"]),
        "validation rows": str(num_rows["validation"]),
        "time": f"{report['seconds']:.0f} s on {report['machine']}",
    }
    return Page(
        title=f"maskft {report['command']}: {report['model_name_or_path']}",
        caption=_caption(report),
        tables=[PageTable(("", "result"), [(name, text) for name, text in rows.items() if text])],
        curves=training_curves(_logs(report), is_nll=_is_nll(report)),
        details={"Settings, versions and data": {key: report[key] for key in report if key != "log_history"}},
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


def _card(report: dict[str, Any], is_written: bool) -> ModelCard:
    mask, model = report.get("mask"), report["model_name_or_path"]
    train, validation = (report["data"][name]["n"] for name in ("train", "validation"))
    if report["command"] == "crossfit":
        reference = report["settings"]["data"]["model_name_or_path"]
        outcome = f"Cross-fitted on {train} rows and judged on {validation} validation rows."
    else:
        reference = report["settings"]["mask"].get("reference_model_name_or_path") if mask else None
        outcome = f"Checkpoint: {_best(report)}. Trained on {train} rows, validated on {validation}."
    metadata = ModelCardData(
        base_model=model,
        library_name="peft" if mask else "transformers",
        pipeline_tag="text-generation",
        tags=["maskft", "mask-fine-tuning"] if mask else ["maskft", "sft"],
    )
    return ModelCard.from_template(
        metadata,
        template_path=str(_CARD),
        model=model,
        version=report["versions"]["maskft"],
        mask=mask,
        reference=reference,
        is_written=is_written,
        sentences=[text for text in (report.get("verdict", {}).get("sentence"), comparison(report), outcome) if text],
    )
