"""Two kinds of task that lm-eval lacks, in its form: the loss of given rows, and reasoning-gym's problems."""

import json
from typing import Any

from datasets import Dataset
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask

from maskft.data.rows import load_rows
from maskft.errors import MaskftError, nearest
from maskft.evaluation.samples import Row
from maskft.evaluation.task import DEFAULT_MAX_NEW_TOKENS, TaskSettings

_DEFAULT_GENERATED = 200


def _definition(name: str, rows: Dataset, **given: Any) -> dict[str, Any]:
    plain = {"task": name, "custom_dataset": lambda **_: {"test": rows}, "test_split": "test", "num_fewshot": 0}
    return plain | {"doc_to_text": lambda doc: "", "doc_to_target": lambda doc: ""} | given


class _NllTask(ConfigurableTask):
    """Negative log-likelihood per completion token; `LanguageModel.completion_nll` answers."""

    def construct_requests(self, doc: Row, ctx: str, **kwargs: Any) -> Instance:
        metadata = kwargs.get("metadata", (None, None, None))
        return Instance("completion_nll", doc, (json.dumps(doc),), 0, metadata=metadata)


def nll_task(name: str, settings: TaskSettings) -> ConfigurableTask:
    """NLL in nats of rows in one of TRL's forms, the end token included.

    Raises:
        MaskftError: no such data, or a row that cannot be used.
    """
    path = name.partition(":")[2]
    if not path:
        raise MaskftError("`nll:` needs a data set, as in nll:validation.jsonl.")
    metric = {"metric": "nll", "aggregation": _per_token, "higher_is_better": False}
    return _NllTask(
        config=_definition(
            name,
            load_rows(path),
            output_type="loglikelihood",
            process_results=lambda doc, results: {"nll": results[0]},
            metric_list=[metric],
        )
    )


def _per_token(values: list[Row]) -> float:
    return float(sum(value["sum"] for value in values) / sum(value["count"] for value in values))


class _GymTask(ConfigurableTask):
    def fewshot_context(self, doc: Row, apply_chat_template: bool = False, **given: Any) -> str:
        """The question as the user's turn of a chat, or as a line."""
        text: str = super().fewshot_context(doc, apply_chat_template=apply_chat_template, **given)
        return text if apply_chat_template else f"{text}\n"


def reasoning_gym_task(name: str, settings: TaskSettings) -> ConfigurableTask:
    """Problems that reasoning-gym generates from a seed, scored by its own checkers.

    `accuracy` is the share of full scores, `score` the mean score, which gives some parts of a point. The answer is the
    text in <answer> tags, else the whole output.

    Raises:
        MaskftError: reasoning-gym has no such problems, or it makes too few different ones.
    """
    import reasoning_gym
    from reasoning_gym.factory import DATASETS
    from reasoning_gym.utils import extract_answer

    kind = name.partition(":")[2]
    if kind not in DATASETS:
        raise MaskftError(f"reasoning-gym has no task {kind!r}{nearest(kind, list(DATASETS))}.")
    entries = _entries(name, int(settings.limit or _DEFAULT_GENERATED), settings.seed or 0)
    scorer = reasoning_gym.get_score_answer_fn(kind)

    def score(doc: Row, results: list[str]) -> Row:
        value = float(scorer(extract_answer(results[0]) or results[0].strip(), json.loads(doc["entry"])))
        return {"accuracy": value == 1.0, "score": value}

    rows = [{"question": entry["question"], "entry": json.dumps(entry, default=str)} for entry in entries]
    return _GymTask(
        config=_definition(
            name,
            Dataset.from_list(rows),
            output_type="generate_until",
            doc_to_text=lambda doc: doc["question"],
            generation_kwargs={"until": [], "max_gen_toks": DEFAULT_MAX_NEW_TOKENS, "do_sample": False},
            process_results=score,
            metric_list=[
                {"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("accuracy", "score")
            ],
        )
    )


def _entries(name: str, num_wanted: int, seed: int) -> list[Row]:
    """So many different problems."""
    import reasoning_gym

    # reasoning-gym draws item i from the seed `seed + i`: neighbouring seeds would share nearly all items.
    stream = reasoning_gym.create_dataset(name.partition(":")[2], seed=seed * 10**6, size=20 * num_wanted)
    entries: dict[str, Row] = {}
    for entry in stream:
        entries.setdefault(entry["question"], entry)
        if len(entries) == num_wanted:
            return list(entries.values())
    raise MaskftError(f"{name} makes only {len(entries)} different problems of {num_wanted}; give a lower --limit.")
