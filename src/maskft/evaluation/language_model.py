"""A loaded model as lm-eval asks it, and one task put to it."""

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from lm_eval.api.instance import Instance
from lm_eval.api.model import hash_args
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import handle_non_serializable
from transformers import PreTrainedTokenizerBase

from maskft.data.tokens import tokenise_row
from maskft.errors import MaskftError
from maskft.evaluation.code_tasks import sandboxed_code
from maskft.evaluation.generation import plain_generation
from maskft.evaluation.samples import Row
from maskft.evaluation.task import EvalTask
from maskft.scoring.nll import token_nll
from maskft.storage.files import disk_errors
from maskft.storage.json_text import json_lines

logger = logging.getLogger(__name__)


class KeptAnswers:
    """lm-eval's hook for answers as they come, kept in a file of JSON lines (lm-eval's own cache is of pickles).

    Answers that were drawn at random are not kept, for equal questions shall have different ones.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.held: dict[str, Any] = {}
        if path is not None and path.exists():
            whole = path.read_bytes().rpartition(b"\n")[0]  # a last line that was cut short is asked for again
            path.write_bytes(whole + b"\n" if whole else b"")
            self.held = dict(pair for _, pair in json_lines(path))

    def add_partial(self, kind: str, arguments: Sequence[Any], answer: Any) -> None:
        if kind == "generate_until" and arguments[1].get("do_sample"):
            return
        key = hash_args(kind, arguments)
        self.held[key] = answer
        if self.path is not None:
            with disk_errors(f"write {self.path}"), self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps([key, answer]) + "\n")


class LanguageModel(HFLM):
    """lm-eval's model over a loaded one.

    What the model's generation_config.json adds to a task (penalties, beams) is left out, and answers end at the tokens
    that training takes for end tokens.
    """

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> None:
        logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns that the model is loaded
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        self.cache_hook = KeptAnswers()

    def _model_generate(self, *args: Any, **kwargs: Any) -> Any:
        with plain_generation(self.model, self.tokenizer):
            return super()._model_generate(*args, **kwargs)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        return self._missing("generate_until", super().generate_until, requests)

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        return self._missing("loglikelihood", super().loglikelihood, requests)

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        return self._missing("loglikelihood_rolling", super().loglikelihood_rolling, requests)

    def completion_nll(self, requests: list[Instance]) -> list[Row]:
        """`sum` in nats and `count` of the completion's tokens in rows, tokenised as training does.

        Rows longer than the context lose their end, and are told of; a loss that is no finite number is refused.
        """
        return self._missing("completion_nll", self._completion_nll, requests)

    def _missing(self, kind: str, ask: Callable[[list[Instance]], list[Any]], requests: list[Instance]) -> list[Any]:
        """Ask for those answers alone that are not kept."""
        kept = [self.cache_hook.held.get(hash_args(kind, request.args)) for request in requests]
        missing = [request for request, answer in zip(requests, kept, strict=True) if answer is None]
        new = iter(ask(missing) if missing else [])
        return [next(new) if answer is None else answer for answer in kept]

    def _completion_nll(self, requests: list[Instance]) -> list[Row]:
        rows = [tokenise_row(json.loads(request.args[0]), self.tokenizer) for request in requests]
        context = getattr(self.config, "max_position_embeddings", None)
        lengths = [len(row["input_ids"]) for row in rows]
        num_cut = sum(context is not None and length > context for length in lengths)
        if num_cut:
            logger.warning(
                "%s: %d of %d rows are longer than the model's context of %d tokens and lost their end.",
                requests[0].task_name,
                num_cut,
                len(rows),
                context,
            )
        order = sorted(range(len(rows)), key=lambda i: (lengths[i], requests[i].args))
        answers: dict[int, Row] = {}
        for start in range(0, len(order), self.batch_size):
            here = order[start : start + self.batch_size]
            batch = [{column: ids[:context] for column, ids in rows[i].items()} for i in here]
            result = token_nll(self.model, Dataset.from_list(batch), batch_size=self.batch_size)
            if not np.isfinite(result.sums).all():
                raise MaskftError(
                    f"The model gives {requests[0].task_name} a loss that is no finite number, with weights in "
                    f"{str(self.model.dtype).removeprefix('torch.')}; try --dtype float32, and if that changes "
                    "nothing, its weights are damaged: give another model."
                )
            for i, total, count in zip(here, result.sums, result.num_tokens, strict=True):
                cut = {"is_cut": True} if context is not None and lengths[i] > context else {}
                answers[i] = {"sum": float(total), "count": int(count)} | cut
                self.cache_hook.add_partial("completion_nll", requests[i].args, answers[i])
        return [answers[i] for i in range(len(rows))]


def ask(model: LanguageModel, task: EvalTask, *, draw: int = 0, **chat: Any) -> tuple[list[Row], Row]:
    """Put a task to a model, as lm-eval does.

    lm-eval's `simple_evaluate` is this with a report of the machine, which takes 9 s each time.

    Args:
        draw: adds to the seed that answers are drawn by.
        chat: lm-eval's `apply_chat_template`, `fewshot_as_multiturn`, `system_instruction`.

    Returns:
        lm-eval's samples, as JSON, a row for each item and filter, and its own results.
    """
    logging.getLogger("lm_eval").setLevel(logging.WARNING)  # of prompts that are cut
    with task.seeded(draw), sandboxed_code(task.name, task.settings.allow_code_execution):
        results = evaluate(
            model,
            {"tasks": {task.name: task.task}, "groups": {}},
            limit=task.settings.limit,
            bootstrap_iters=0,
            confirm_run_unsafe_code=task.settings.allow_code_execution,
            **chat,
        )
    plain = (results["samples"][task.name], results["results"][task.name])
    samples, scores = json.loads(json.dumps(plain, default=handle_non_serializable))
    return samples, scores
