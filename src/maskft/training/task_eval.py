"""Tasks that are scored while a run trains, with the mask as it will be used."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import EarlyStoppingCallback as PlainEarlyStoppingCallback
from transformers import (
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from maskft.data.tokens import tokenise_row
from maskft.errors import MaskftError
from maskft.evaluation.generation import Decoding, generate_batches
from maskft.evaluation.tasks import NllTask, Task, TaskSettings, chat_template_of
from maskft.scoring.nll import token_nll
from maskft.training.arguments import TrainingSettings, metric_name, split_tasks


class TaskEvalCallback(TrainerCallback):
    """Scores a few items of each task whenever the trainer evaluates: `eval_<task>` stands beside `eval_loss`.

    The scores are in the metrics that the trainer chooses its best checkpoint by, and in its log. Answers are greedy,
    prompts are rendered by the chat template where the tokenizer has one.
    """

    def __init__(self, trainer: Trainer, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[Task]) -> None:
        self.trainer, self.tokenizer, self.tasks = trainer, tokenizer, tasks

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        batch_size = args.per_device_eval_batch_size
        scores = {
            metric_name(t.name): score_task(self.trainer.model, self.tokenizer, t, batch_size) for t in self.tasks
        }
        if metrics is not None:
            metrics |= scores  # the dictionary that the trainer goes on with
        self.trainer.log(scores)


class EarlyStoppingCallback(PlainEarlyStoppingCallback):
    """Transformers', which goes on counting from where a checkpoint had got to."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        saved: Any = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        self.early_stopping_patience_counter = saved["attributes"]["early_stopping_patience_counter"]


def score_task(model: Any, tokenizer: PreTrainedTokenizerBase, task: Task, batch_size: int) -> float:
    """The task's main metric over its items; the model is left in the mode it had."""
    from maskft.evaluation.scores import Scored, metrics_of

    was_training = model.training
    model.eval()
    if isinstance(task, NllTask):
        rows = [tokenise_row(item.content, tokenizer) for item in task.items]
        score = token_nll(model, Dataset.from_list(rows), batch_size=batch_size).mean
    else:
        chat = chat_template_of(tokenizer) if tokenizer.chat_template is not None else None
        decoding = Decoding(task.max_new_tokens, tuple(task.stop), batch_size)
        prompts = [task.prompt(item, chat) for item in task.items]
        ids = [item.id for item in task.items]
        batches = generate_batches(model, tokenizer, prompts, decoding, ids=ids, add_special_tokens=chat is None)
        judged = [
            {"item": ids[place], "verdict": task.judge(task.items[place], answer.text).verdict}
            for batch in batches
            for place, answer in batch
        ]
        score = Scored(judged, metrics_of(judged)[0]).value
    model.train(was_training)
    return score


def load_eval_tasks(settings: TrainingSettings, tokenizer: PreTrainedTokenizerBase) -> list[Task]:
    """The tasks of `--eval_tasks`.

    Raises:
        MaskftError: a task that does not exist, whose data are missing, or that a run cannot score; two tasks of one
            name among the metrics.
    """
    if not settings.eval_tasks:
        return []
    from maskft.evaluation.lm_eval_tasks import CODE_TASKS
    from maskft.evaluation.runner import load_tasks

    names = split_tasks(settings.eval_tasks)
    _require_own_metrics(names)
    for name in names:
        if name in CODE_TASKS:
            raise MaskftError(
                f"--eval_tasks names {name}, but generated code is run by maskft eval alone; leave it out."
            )
    if settings.eval_strategy == "no":
        raise MaskftError("--eval_tasks has no effect with --eval_strategy no; give steps or epoch.")
    data_dir = Path(settings.eval_data_dir) if settings.eval_data_dir else None
    tasks = load_tasks(settings.eval_tasks, TaskSettings(data_dir=data_dir, limit=settings.eval_tasks_limit))
    for task in tasks:
        if isinstance(task, NllTask) and task.needs_chat_template and tokenizer.chat_template is None:
            raise MaskftError(f"The rows of {task.name} are conversations, but the tokenizer has no chat template.")
    return tasks


def _require_own_metrics(names: Sequence[str]) -> None:
    """Refuse two tasks whose scores would have one name, so that one would be lost."""
    by_metric: dict[str, str] = {}
    for name in names:
        other = by_metric.setdefault(metric_name(name), name)
        if other != name:
            raise MaskftError(
                f"--eval_tasks names {other} and {name}, and both would be scored as {metric_name(name)}; rename the "
                "file of one, or leave one out."
            )


def watch_tasks(
    trainer: Trainer, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[Task], settings: TrainingSettings
) -> None:
    """Score the tasks while `trainer` trains, and stop it early where the settings say so."""
    if tasks:
        trainer.add_callback(TaskEvalCallback(trainer, tokenizer, tasks))
    # After the callback above, whose scores it may watch.
    if settings.early_stopping_patience is not None:
        trainer.add_callback(EarlyStoppingCallback(settings.early_stopping_patience))
