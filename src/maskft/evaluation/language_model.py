"""A loaded model as lm-eval asks it, one task put to it, and the task of given rows' loss, which lm-eval lacks."""

import json
import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lm_eval.api.task
import numpy as np
from datasets import Dataset
from lm_eval.api.instance import Instance
from lm_eval.api.model import hash_args
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import handle_non_serializable
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from maskft.data.rows import load_rows
from maskft.data.tokens import RowTokeniser, refused_in_words
from maskft.errors import MaskftError
from maskft.evaluation.code_tasks import sandboxed_code
from maskft.evaluation.generation import plain_generation
from maskft.evaluation.samples import Row
from maskft.evaluation.tasks import EvalTask
from maskft.scoring.nll import token_nll
from maskft.storage.files import disk_errors
from maskft.storage.json_text import json_lines

logger = logging.getLogger(__name__)
lm_eval.api.task.tqdm = partial(tqdm, disable=True)  # of building prompts: a second bar for each task


class KeptAnswers:
    """lm-eval's hook for answers as they come, kept in a file of JSON lines (lm-eval's own cache is of pickles)."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.held: dict[str, Any] = {}
        if path is not None and path.exists():
            whole = path.read_bytes().rpartition(b"\n")[0]  # a last line that was cut short is asked for again
            path.write_bytes(whole + b"\n" if whole else b"")
            for where, pair in json_lines(path):
                if not (isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str)):
                    raise MaskftError(f"{where} holds no answer; remove the file, and all are asked for again.")
                self.held[pair[0]] = pair[1]

    def add_partial(self, kind: str, arguments: Sequence[Any], answer: Any) -> None:
        """Keep an answer, but for those drawn at random: equal questions shall have different ones."""
        if kind == "generate_until" and arguments[1].get("do_sample"):
            return
        key = hash_args(kind, arguments)
        self.held[key] = answer
        if self.path is not None:
            with disk_errors(f"write {self.path}"), self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps([key, answer]) + "\n")


def _missing_only(ask: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
    """A method of lm-eval's model that is asked only for answers that are not kept."""
    kind = ask.__name__

    def asked(self: "LanguageModel", requests: list[Instance]) -> list[Any]:
        kept = [self.cache_hook.held.get(hash_args(kind, request.args)) for request in requests]
        missing = [request for request, answer in zip(requests, kept, strict=True) if answer is None]
        new = iter(ask(self, missing, disable_tqdm=self.is_quiet) if missing else [])
        return [next(new) if answer is None else answer for answer in kept]

    return asked


class LanguageModel(HFLM):
    """lm-eval's model over a loaded one, which is asked only for answers that are not kept in the file `answers`.

    What the model's generation_config.json adds to a task (penalties, beams) is left out, and answers end at the tokens
    that training takes for end tokens.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int,
        answers: Path | None = None,
        *,
        is_quiet: bool = False,
    ) -> None:
        logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns that the model is loaded
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        self.cache_hook = KeptAnswers(answers)
        self.is_quiet = is_quiet

    generate_until = _missing_only(HFLM.generate_until)
    loglikelihood = _missing_only(HFLM.loglikelihood)
    loglikelihood_rolling = _missing_only(HFLM.loglikelihood_rolling)

    def _model_generate(self, *args: Any, **kwargs: Any) -> Any:
        with plain_generation(self.model, self.tokenizer):
            return super()._model_generate(*args, **kwargs)

    def apply_chat_template(self, *args: Any, **kwargs: Any) -> str:
        """As lm-eval does; MaskftError where the template refuses the messages."""
        return str(refused_in_words(super().apply_chat_template, *args, **kwargs))

    @_missing_only
    def completion_nll(self, requests: list[Instance], disable_tqdm: bool) -> list[Row]:
        """`sum` in nats and `count` of the completion's tokens in rows, tokenised as training does.

        Rows longer than the context lose their end, and are told of; a loss that is no finite number is refused.
        """
        tokenise = RowTokeniser(self.tokenizer)
        rows = [tokenise(json.loads(request.args[0])) for request in requests]
        context = getattr(self.config, "max_position_embeddings", None)
        lengths = [max(len(part["input_ids"]) for part in parts) for parts in rows]
        are_cut = [context is not None and length > context for length in lengths]
        task = requests[0].task_name
        if any(are_cut):
            told = "%s: %d of %d rows are longer than the model's context of %d tokens and lost their end."
            logger.warning(told, task, sum(are_cut), len(rows), context)
        order = sorted(range(len(rows)), key=lambda i: (lengths[i], requests[i].args))
        answers: dict[int, Row] = {}
        for start in tqdm(range(0, len(order), self.batch_size), disable=disable_tqdm):
            here = order[start : start + self.batch_size]
            owners, parts = zip(*((n, part) for n, i in enumerate(here) for part in rows[i]), strict=True)
            batch = [{column: part[column][:context] for column in ("input_ids", "labels")} for part in parts]
            result = token_nll(self.model, Dataset.from_list(batch), batch_size=self.batch_size)
            if not np.isfinite(result.sums).all():
                dtype = str(self.model.dtype).removeprefix("torch.")
                hint = "try --dtype float32; if that changes nothing, its weights are damaged: give another model."
                what = "a loss that is no finite number, with weights in"
                raise MaskftError(f"The model gives {task} {what} {dtype}; {hint}")
            sums, counts = (np.bincount(owners, values) for values in (result.sums, result.num_tokens))
            for i, total, count in zip(here, sums, counts, strict=True):
                answers[i] = {"sum": float(total), "count": int(count)} | ({"is_cut": True} if are_cut[i] else {})
                self.cache_hook.add_partial("completion_nll", requests[i].args, answers[i])
        return [answers[i] for i in range(len(rows))]


class _NllTask(ConfigurableTask):
    def construct_requests(self, doc: Row, ctx: str, **kwargs: Any) -> Instance:
        metadata = kwargs.get("metadata", (None, None, None))
        return Instance("completion_nll", doc, (json.dumps(doc),), 0, metadata=metadata)


def nll_task(name: str, **_: Any) -> ConfigurableTask:
    """NLL in nats for each token of the completions of rows in one of TRL's forms, the end token included."""
    path = name.partition(":")[2]
    if not path:
        raise MaskftError("`nll:` needs a data set, as in nll:validation.jsonl.")
    rows = load_rows(path)

    def per_token(values: list[Row]) -> float:
        return float(sum(value["sum"] for value in values) / sum(value["count"] for value in values))

    config: Row = {"task": name, "custom_dataset": lambda **_: {"test": rows}, "test_split": "test", "num_fewshot": 0}
    config |= {"output_type": "loglikelihood", "doc_to_text": lambda doc: "", "doc_to_target": lambda doc: ""}
    config["process_results"] = lambda doc, results: {"nll": results[0]}
    config["metric_list"] = [{"metric": "nll", "aggregation": per_token, "higher_is_better": False}]
    return _NllTask(config=config)


def ask(model: LanguageModel, task: EvalTask, *, draw: int = 0, **chat: Any) -> tuple[list[Row], Row]:
    """lm-eval's samples, as JSON, a row for each item and filter, and its own results, of one task.

    lm-eval's `simple_evaluate` is this with a report of the machine, which takes 9 s. `draw` adds to the seed; `chat`
    is lm-eval's `apply_chat_template`, `fewshot_as_multiturn`, `system_instruction`.
    """
    logging.getLogger("lm_eval").setLevel(logging.WARNING)  # of prompts that are cut
    is_allowed = task.settings.allow_code_execution
    given = {"limit": task.settings.limit, "bootstrap_iters": 0, "confirm_run_unsafe_code": is_allowed} | chat
    with task.seeded(draw), sandboxed_code(task.name, is_allowed):
        results = evaluate(model, {"tasks": {task.name: task.task}, "groups": {}}, **given)
    plain = (results["samples"][task.name], results["results"][task.name])
    samples, scores = json.loads(json.dumps(plain, default=handle_non_serializable))
    return samples, scores
