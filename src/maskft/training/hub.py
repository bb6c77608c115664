"""A model hub: what a card tells it of a run, and `--push_to_hub`, which pushes the result without its checkpoints."""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, HfApi, ModelCardData, get_token
from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined] # of the HTTP client that it uses

from maskft.adapters.model_files import hub_name
from maskft.errors import MaskftError, first_line
from maskft.training.arguments import TrainingSettings

logger = logging.getLogger(__name__)

# What a hub that is not there, or does not take a name, a token or a large file, raises.
_REFUSALS = (OSError, ValueError, RuntimeError, HTTPError)


def open_repository(settings: TrainingSettings, model_name_or_path: str) -> str | None:
    """Make the repository that the result is to be pushed to, where it is not there yet, before any work.

    Returns:
        Its name; None where nothing is pushed.

    Raises:
        MaskftError: no token, no hub that answers, or a repository that may not be written to.
    """
    if not settings.push_to_hub:
        return None
    token = settings.hub_token or get_token()
    if not token:
        raise MaskftError("`push_to_hub` needs a token that may write; run `hf auth login`, or set HF_TOKEN.")
    name, api = settings.hub_model_id or Path(str(settings.output_dir)).absolute().name, HfApi(token=token)
    try:
        repository: str = api.create_repo(name, private=settings.hub_private_repo, exist_ok=True).repo_id
        api.auth_check(repository, write=True)  # one that is there may be another's
        if settings.hub_revision:
            api.create_branch(repository, branch=settings.hub_revision, exist_ok=True)
    except _REFUSALS as error:
        what = f"`push_to_hub` cannot open the repository {name!r} ({first_line(error)})"
        raise MaskftError(f"{what}; correct --hub_model_id, the token or HF_ENDPOINT, or leave it out.") from error
    if hub_name(model_name_or_path) is None:
        logger.warning(
            "Others cannot load %s without its base model, which it knows as the folder %s; push that too.",
            repository,
            model_name_or_path,
        )
    return repository


def push_result(settings: TrainingSettings, repository: str, folder: Path, files: Sequence[str]) -> None:
    """Push these files of a result's folder; MaskftError where the hub refuses, with the result left there."""
    try:
        commit = HfApi(token=settings.hub_token).upload_folder(
            repo_id=repository,
            folder_path=folder,
            allow_patterns=list(files),
            revision=settings.hub_revision,
            commit_message="Result of maskft",
        )
    except _REFUSALS as error:
        told = f"The result is in {folder}, and {repository} did not take it ({first_line(error)})"
        raise MaskftError(f"{told}; push it with hf upload {repository} {folder} --exclude 'checkpoint-*'.") from error
    logger.info("Pushed %s to %s.", repository, commit.commit_url)


def card_data(report: dict[str, Any], model_name: str) -> ModelCardData:
    """What a hub reads of a card: base model and data sets that it may hold, the task, and the run's results."""
    settings, is_mask = report["settings"].get("data", report["settings"]), "mask" in report
    given = [settings.get("dataset_name"), *settings.get("dataset_mixer", {}), settings.get("retain_dataset_name")]
    results = list(_results(report))
    return ModelCardData(
        base_model=hub_name(report["model_name_or_path"]),
        datasets=[name for name in map(hub_name, given) if name] or None,
        library_name="peft" if is_mask else "transformers",
        pipeline_tag="text-generation",
        tags=["maskft", "mask-fine-tuning" if is_mask else "sft"],
        metrics=sorted({result.metric_type for result in results}) or None,
        model_name=model_name,
        eval_results=results or None,
    )


def _results(report: dict[str, Any]) -> Iterator[EvalResult]:
    """The value that chose the checkpoint, the same without the mask, and the differences of the verdict."""
    best, verdict = report["best"], report.get("verdict", {})
    if best["value"] is not None:
        yield _result(report, best["metric"].removeprefix("eval_"), best["value"], "validation; chose the checkpoint")
    if best["value"] is not None and "without_mask" in report:
        yield _result(report, "loss", report["without_mask"]["eval_loss"], "validation; without the mask")
    rows = {"difference": "held-out task", "task": "held-out task", "retained": "held-out general"}
    for key, of in rows.items():
        if key in verdict:
            interval = {name: verdict[key][name] for name in ("low", "high", "n")}
            p = verdict.get("p", verdict.get(f"p_{key}"))
            told = f"{of} rows; NLL per token with the mask minus without it, 95 % interval"
            yield _result(report, "nll_difference", verdict[key]["estimate"], told, interval | {"p": p})


def _result(report: dict[str, Any], metric: str, value: float, name: str, args: dict[str, Any] | None = None) -> Any:
    settings = report["settings"].get("data", report["settings"])
    dataset = str(settings.get("eval_dataset_name") or settings.get("dataset_name") or "mixture")
    return EvalResult(
        task_type="text-generation",
        dataset_type=hub_name(dataset) or "local",
        dataset_name=Path(dataset).name,
        dataset_split="validation",
        metric_type=metric,
        metric_name=f"{metric} ({name})",
        metric_value=value,
        metric_args=args,
    )
