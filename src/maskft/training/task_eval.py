"""Tasks that are scored while a run trains, with the mask as it will be used."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import EarlyStoppingCallback as PlainEarlyStoppingCallback
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback

from maskft.errors import MaskftError
from maskft.evaluation.tasks import EvalTask, TaskSettings, load_tasks
from maskft.training.arguments import TrainingSettings, metric_name, split_tasks


class TaskEvalCallback(TrainerCallback):
    """Scores a few items of each task whenever the trainer evaluates: `eval_<task>` stands beside `eval_loss`.

    The scores are in the metrics that the trainer chooses its best checkpoint by, and in its log. Answers are greedy,
    prompts are rendered by the chat template where the tokenizer has one.
    """

    def __init__(self, trainer: Trainer, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[EvalTask]) -> None:
        self.trainer, self.tokenizer, self.tasks = trainer, tokenizer, tasks

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        model, batch_size = self.trainer.model, args.per_device_eval_batch_size
        scores = {metric_name(t.name): score_task(model, self.tokenizer, t, batch_size) for t in self.tasks}
        if metrics is not None:
            metrics |= scores  # the dictionary that the trainer goes on with
        self.trainer.log(scores)


class EarlyStoppingCallback(PlainEarlyStoppingCallback):
    """Transformers', which goes on counting from where a checkpoint had got to."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        saved: Any = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        self.early_stopping_patience_counter = saved["attributes"]["early_stopping_patience_counter"]


def score_task(model: Any, tokenizer: PreTrainedTokenizerBase, task: EvalTask, batch_size: int) -> float:
    """The task's main metric over its items; the model is left in the mode it had."""
    from maskft.evaluation.language_model import LanguageModel, ask
    from maskft.evaluation.scores import Scored, metrics_of

    was_training = model.training
    chat = tokenizer.chat_template is not None and not task.is_nll
    asked = LanguageModel(model, tokenizer, batch_size, is_quiet=True)
    rows, _ = ask(asked, task, apply_chat_template=chat, fewshot_as_multiturn=chat)
    model.train(was_training)
    return float(Scored([rows], metrics_of(rows)[0]).parts.sum())


def load_eval_tasks(settings: TrainingSettings, tokenizer: PreTrainedTokenizerBase) -> list[EvalTask]:
    """The tasks of `--eval_tasks`; MaskftError for one that does not exist, or that a run cannot score."""
    if not settings.eval_tasks:
        return []
    by_metric: dict[str, str] = {}
    for name in split_tasks(settings.eval_tasks):
        other = by_metric.setdefault(metric_name(name), name)
        if other != name:
            raise MaskftError(f"{other} and {name} would both be scored as {metric_name(name)}; leave one out.")
    data_dir = Path(settings.eval_data_dir) if settings.eval_data_dir else None
    tasks = load_tasks(settings.eval_tasks, TaskSettings(data_dir=data_dir, limit=settings.eval_tasks_limit))
    for task in tasks:
        if task.is_nll and not isinstance(task.docs[0]["prompt"], str) and tokenizer.chat_template is None:
            raise MaskftError(f"The rows of {task.name} are conversations, but the tokenizer has no chat template.")
        metric, is_better = next(iter(task.task.higher_is_better().items()))
        if metric_name(task.name) == settings.metric_for_best_model and settings.greater_is_better and not is_better:
            raise MaskftError(f"Of {task.name}'s {metric} lower is better; give --greater_is_better False.")
    return tasks


def watch_tasks(
    trainer: Trainer, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[EvalTask], settings: TrainingSettings
) -> None:
    """Score the tasks while `trainer` trains, and stop it early where the settings say so."""
    if tasks:
        trainer.add_callback(TaskEvalCallback(trainer, tokenizer, tasks))
    # After the callback above, whose scores it may watch.
    if settings.early_stopping_patience is not None:
        trainer.add_callback(EarlyStoppingCallback(settings.early_stopping_patience))
