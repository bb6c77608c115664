"""What a run of `maskft sft`, `train` or `crossfit` leaves beside its weights: report.json, report.html, model card."""

import json
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from huggingface_hub import ModelCard
from transformers import PreTrainedTokenizerBase

from maskft.adapters.read import check_saved
from maskft.data.rows import data_hash, token_hash
from maskft.errors import NoGainError
from maskft.report import Page, PageTable, tradeoff_curve, training_curves, write_html
from maskft.storage.environment import machine, versions
from maskft.storage.files import atomic_folder, disk_errors
from maskft.storage.json_text import plain
from maskft.terminal import markdown
from maskft.training.hub import card_data


def begin_report(
    command: str,
    model: str,
    settings: dict[str, Any],
    rows: dict[str, Dataset],
    found: dict[str, dict[str, int]] | None,
) -> dict[str, Any]:
    """What a report says of a run before it begins: of its splits, and of what :class:`Reader` `found` in data sets."""
    data: dict[str, Any] = {name: {"n": len(of), "sha256": data_hash(of)} for name, of in rows.items()}
    for name, of in rows.items():
        if "labels" in of.column_names:  # general rows may have no answers yet
            data[name]["sha256_tokens"] = token_hash(of)
    settings = {key: value for key, value in settings.items() if value is not None and not key.endswith("_token")}
    report = {"command": command, "model_name_or_path": model, "settings": plain(settings), "versions": versions()}
    return report | {"machine": machine(), "data": data, "data_sets": found or {}}


def write_result(
    output_dir: Path,
    report: dict[str, Any],
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    *,
    masks: dict[str, torch.Tensor] | None = None,
    weights: dict[str, torch.Tensor] | None = None,
    is_kept: bool = True,
) -> list[str]:
    """Write model or adapter, tokenizer and reports, each under its name only when all are complete.

    An adapter is read back and has to hold `masks`; `weights` are the state dict to save where it is not the model's
    own; not `is_kept` writes the reports alone. Returns the names of the files.
    """
    with disk_errors(f"write the result in {output_dir}"), atomic_folder(output_dir) as folder:
        if is_kept:
            model.save_pretrained(folder, state_dict=weights)
            tokenizer.save_pretrained(folder)
        if is_kept and masks is not None:
            check_saved(folder, masks)
        write_reports(folder, report, name=output_dir.absolute().name, is_kept=is_kept)
        return [path.name for path in folder.iterdir()]


def write_reports(folder: Path, report: dict[str, Any], *, name: str = "result", is_kept: bool = True) -> None:
    """The reports of :func:`write_result`, for a result of that name."""
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    write_html(folder / "report.html", _page(report))
    (folder / "README.md").write_text(str(_card(report, name, is_kept)), encoding="utf-8")


def require_shown_gain(report: dict[str, Any], output_dir: Path) -> None:
    """NoGainError where the verdict of a report, which lies in `output_dir`, shows no gain."""
    verdict = report.get("verdict")
    if verdict and not verdict["has_gain"]:
        where = output_dir / "report.html"
        raise NoGainError(f"{verdict['sentence']} No adapter was written; {where} has the numbers.")


def _page(report: dict[str, Any]) -> Page:
    mask, data = report.get("mask", {}), report["data"]
    restored = report.get("restore", {}).get("sentence")
    told = (report.get("verdict", {}).get("sentence"), restored, comparison(report))
    verdict = next(filter(None, told), "")
    rows = {
        "checkpoint": None if report["command"] == "crossfit" else _chosen(report),
        "mask": comparison(report),
        "given back": restored,
        "weights kept": mask and f"{100 * mask['kept_share']:.3f} % of {mask['num_weights']:,}",
        "weights that could flip": "reachable_share" in mask and f"at most {100 * mask['reachable_share']:.2f} %",
        "training rows": str(data["train"]["n"]),
        "validation rows": str(data["validation"]["n"]),
        "time": f"{report['seconds']:.0f} s on {report['machine']}",
    }
    return Page(
        title=f"maskft {report['command']}: {report['model_name_or_path']}",
        caption=_caption(report),
        verdict=verdict,
        tables=[PageTable(("", "result"), [(name, text) for name, text in rows.items() if text and text != verdict])],
        curves=([tradeoff_curve(report["restore"])] if "restore" in report else [])
        + training_curves(_logs(report), is_nll=bool(_unit(report))),
        details={"Settings, versions and data": {key: report[key] for key in report if key != "log_history"}},
    )


def _caption(report: dict[str, Any]) -> str:
    if report["command"] == "crossfit":
        told = "{num_repeats} x cross-fitting of {num_folds} folds over {num_fine_tunings} fine-tuning(s)"
        return told.format(**report["settings"]["crossfit"]) + (
            "; validation rows chose none of the scores, but may have chosen the checkpoints of fine-tunings, those of "
            "the folds too."
        )
    if "averaged" in report:
        return "The average of runs with other seeds; validation chose their checkpoints, so no value is a test result."
    if report["best"]["value"] is None:
        return "One run, one seed; no checkpoint was chosen."
    return "One run, one seed; validation chose the checkpoint, so its value is no test result."


def _chosen(report: dict[str, Any]) -> str:
    """Which checkpoint a result is, and what validation gave for it."""

    def score(best: dict[str, Any]) -> str:
        if best["value"] is None:
            return "not chosen by validation"
        unit = _unit(report) if best["metric"] == "eval_loss" else ""
        return f"{best['metric']} {best['value']:.4f}{unit} at step {best['step']}"

    if "averaged" in report:
        each = "; ".join(score(run["best"]) for run in report["averaged"])
        return f"of {len(report['averaged'])} fine-tunings, which are averaged: {each}"
    best, name = report["best"], report["best"]["metric"]
    if best["value"] is not None:
        return f"the best, {score(best)}"
    last = [best | {"value": entry[name], "step": entry["step"]} for entry in report["log_history"] if name in entry]
    return f"the last, not chosen by validation{f' (last evaluation: {score(last[-1])})' if last else ''}"


def _unit(report: dict[str, Any]) -> str:
    """What a loss is in; empty where it is another than the negative log-likelihood of the tokens."""
    settings = report["settings"]
    is_changed = settings.get("label_smoothing_factor") or settings.get("temperature_scaling")
    is_nll = not is_changed and settings.get("loss_type", "nll") in ("nll", "chunked_nll")
    return " (NLL per token in nats, mean over batches)" if is_nll else ""


def comparison(report: dict[str, Any]) -> str:
    """The validation losses without the mask and with it; empty where one of them is not known."""
    best, losses = report["best"], {e["step"]: e["eval_loss"] for e in report["log_history"] if "eval_loss" in e}
    if "without_mask" not in report or not losses:
        return ""
    text = f"Validation loss without the mask {report['without_mask']['eval_loss']:.4f}, with it "
    if best["value"] is None:
        return f"{text}{losses[max(losses)]:.4f} at the last evaluation."
    return f"{text}{losses[best['step']]:.4f}, which is optimistic: validation chose the checkpoint."


def _logs(report: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """What is drawn: the log, and the loss without the mask as a line from its first evaluation to its last."""
    log = report["log_history"]
    steps = [entry["step"] for entry in log if "eval_loss" in entry]
    if "without_mask" not in report or not steps:
        return {report["command"]: log}
    ends = [report["without_mask"] | {"step": step} for step in (steps[0], steps[-1])]
    return {"with the mask": log, "without the mask": ends}


def _card(report: dict[str, Any], name: str, is_kept: bool) -> ModelCard:
    mask, settings = report.get("mask"), report["settings"]
    train, validation = (report["data"][split]["n"] for split in ("train", "validation"))
    if report["command"] == "crossfit":
        reference = settings["data"]["model_name_or_path"]
        outcome = f"Cross-fitted on {train} rows and judged on {validation} validation rows."
    else:
        reference = settings.get("mask", {}).get("reference_model_name_or_path")
        outcome = f"Checkpoint: {_chosen(report)}. Trained on {train} rows, validated on {validation}."
    sentences = [report.get("verdict", {}).get("sentence"), comparison(report), outcome]
    path = str(Path(__file__).with_name("card.md"))
    given = {
        "markdown": markdown,
        "report": report,
        "mask": mask,
        "reference": reference,
        "is_kept": is_kept,
        "sentences": sentences,
    }
    return ModelCard.from_template(card_data(report, name), template_path=path, **given)
