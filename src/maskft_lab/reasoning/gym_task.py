"""`reasoning_gym:NAME`, a kind of task for `maskft eval`: problems that reasoning-gym generates and checks."""

import json
from typing import Any

import reasoning_gym
from datasets import Dataset
from lm_eval.api.task import ConfigurableTask
from reasoning_gym.factory import DATASETS
from reasoning_gym.utils import extract_answer

from maskft.errors import MaskftError, nearest
from maskft.evaluation.tasks import DEFAULT_MAX_NEW_TOKENS
from maskft_lab.reasoning.sums import distinct_entries

_DEFAULT_GENERATED = 200


class _GymTask(ConfigurableTask):
    def fewshot_context(self, doc: Any, apply_chat_template: bool = False, **given: Any) -> str:
        """The question as the user's turn of a chat, or as a line."""
        text: str = super().fewshot_context(doc, apply_chat_template=apply_chat_template, **given)
        return text if apply_chat_template else f"{text}\n"


def gym_task(name: str, *, limit: float | None = None, seed: int | None = None) -> ConfigurableTask:
    """`limit` different problems from a seed, scored by reasoning-gym's own checkers.

    `accuracy` is the share of full scores, `score` the mean score, which gives some parts of a point. The answer is the
    text in <answer> tags, else the whole output.
    """
    kind, num_wanted = name.partition(":")[2], int(limit or _DEFAULT_GENERATED)
    if kind not in DATASETS:
        raise MaskftError(f"reasoning-gym has no task {kind!r}{nearest(kind, list(DATASETS))}.")
    entries = distinct_entries(kind, seed or 0, num_wanted)
    if len(entries) < num_wanted:
        raise MaskftError(f"{name} makes only {len(entries)} different problems of {num_wanted}; give a lower --limit.")
    scorer = reasoning_gym.get_score_answer_fn(kind)
    rows = Dataset.from_list([{"question": e["question"], "entry": json.dumps(e, default=str)} for e in entries])

    def score(doc: Any, results: list[str]) -> dict[str, Any]:
        value = float(scorer(extract_answer(results[0]) or results[0].strip(), json.loads(doc["entry"])))
        return {"accuracy": value == 1.0, "score": value}

    mean = {"aggregation": "mean", "higher_is_better": True}
    return _GymTask(
        config={
            "task": name,
            "custom_dataset": lambda **_: {"test": rows},
            "test_split": "test",
            "num_fewshot": 0,
            "output_type": "generate_until",
            "doc_to_text": lambda doc: doc["question"],
            "doc_to_target": lambda doc: "",
            "generation_kwargs": {"until": [], "max_gen_toks": DEFAULT_MAX_NEW_TOKENS, "do_sample": False},
            "process_results": score,
            "metric_list": [{"metric": metric, **mean} for metric in ("accuracy", "score")],
        }
    )
