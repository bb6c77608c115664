"""The tasks of an evaluation: lm-eval's, by name, group, tag or YAML file, and two kinds of our own in its form."""

import logging
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from maskft.errors import MaskftError, first_line, nearest
from maskft.evaluation.code_tasks import not_allowed, require_sandbox, sandboxed_code
from maskft.evaluation.local_data import served
from maskft.evaluation.punkt import ensure_punkt
from maskft.evaluation.samples import Row
from maskft.evaluation.task import EvalTask, TaskSettings

logger = logging.getLogger(__name__)

OWN_KINDS = ("nll:", "reasoning_gym:")


def load_tasks(names: str, settings: TaskSettings, documents: Sequence[Row] | None = None) -> list[EvalTask]:
    """The tasks of a comma-separated list, those of groups and tags one by one.

    Args:
        documents: items to use instead of the tasks' data, in their data sets' columns.

    Raises:
        MaskftError: an unknown name, data that are missing or cannot be used, more worked examples than there are, or
            code that may not be executed.
    """
    wanted = list(dict.fromkeys(name.strip() for name in names.split(",")))
    if "alpaca_eval" in wanted:
        raise MaskftError(
            "maskft eval no longer asks AlpacaEval's judge; write answers with examples/alpaca_eval.py and give them "
            "to the command `alpaca_eval`."
        )
    try:
        import lm_eval.tasks  # noqa: F401
    except ImportError as error:
        raise MaskftError(f"Tasks need lm-eval ({error}); run `pip install 'maskft[eval]'`.") from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    found: dict[str, EvalTask] = {}
    for name in wanted:
        for task in _load(name, settings, documents):
            found.setdefault(task.name, task).groups.update(task.groups)
    for task in found.values():
        _configure(task)
        if task.name == "ifeval" and documents is None:
            _check_instructions(task)
    return list(found.values())


def _load(name: str, settings: TaskSettings, documents: Sequence[Row] | None) -> list[EvalTask]:
    from maskft.evaluation import own_tasks

    if name.startswith(OWN_KINDS):
        make = own_tasks.nll_task if name.startswith("nll:") else own_tasks.reasoning_gym_task
        return [EvalTask(name, make(name, settings), settings)]
    loaded = _load_lm_eval(name, settings, documents)
    tasks = [EvalTask(leaf, task, settings) for leaf, task in loaded["tasks"].items()]
    for group in loaded["groups"].values():
        leaves = {task.task_name for task in group.get_all_tasks()}
        metrics = {metric.metric: metric.weight_by_size for metric in group.aggregate_metric_list or []}
        for task in tasks:
            if metrics and task.name in leaves:
                task.groups[group.name] = {"num_tasks": len(leaves), "metrics": metrics}
    return tasks


def _load_lm_eval(name: str, settings: TaskSettings, documents: Sequence[Row] | None) -> Any:
    from lm_eval.tasks._yaml_loader import load_yaml

    manager = _manager_for(name, settings.include_path)
    if name not in manager.all_tasks and not Path(name).is_file():
        known = [*manager.all_tasks, *(f"{kind}NAME" for kind in OWN_KINDS)]
        raise MaskftError(f"There is no task {name!r}{nearest(name, known)}; correct its name.")
    entry = manager.task_index.get(name)
    definition = load_yaml(entry.yaml_path, resolve_func=False) if entry is not None and entry.yaml_path else {}
    if definition.get("unsafe_code") and not settings.allow_code_execution:
        raise not_allowed(name)  # before its data are fetched
    if "ifeval" in name:
        _prepare_ifeval()
    try:
        with served(name, settings.data_dir, documents), sandboxed_code(name, settings.allow_code_execution):
            return manager.load([name])
    except MaskftError:
        raise
    except (OSError, ValueError, RuntimeError, LookupError, TypeError, ImportError) as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        if documents is not None or settings.data_dir is not None:
            what = f"The rows of {name} cannot be used ({reason}); docs/evaluation.md says what its files hold."
        else:
            what = (
                f"{name} cannot be loaded with its data ({reason}); where the hub is out of reach, give a folder of "
                "local files: --data_dir of maskft eval, --eval_data_dir of a training run."
            )
        raise MaskftError(what) from error


def _manager_for(name: str, include_path: str | None) -> Any:
    """An index that holds `name`: of the folders a task may lie in, for an index of all 14,000 takes 10 s."""
    import lm_eval.tasks

    root = Path(lm_eval.tasks.__file__).parent
    folders = tuple(sorted(str(f) for f in root.iterdir() if f.is_dir() and name.startswith(f.name)))
    few = _manager(folders, include_path)
    is_task = name in few.all_subtasks or (Path(name).is_file() and "group:" not in Path(name).read_text())
    return few if is_task else _manager(None, include_path)


@cache
def _manager(folders: tuple[str, ...] | None, include_path: str | None) -> Any:
    from lm_eval.tasks import TaskManager

    included = [include_path] if include_path else []
    return TaskManager(include_path=[*(folders or ()), *included], include_defaults=folders is None)


def _prepare_ifeval() -> None:
    ensure_punkt()
    import langdetect

    # Without a seed its verdicts on short texts change from run to run.
    langdetect.DetectorFactory.seed = 0


def _configure(task: EvalTask) -> None:
    """Put the settings over the task's own, by lm-eval's rule: a definition without shots stays without."""
    given, config, name = task.settings, task.task.config, task.name
    require_sandbox(task)
    if task.task.OUTPUT_TYPE == "generate_until" and given.gen_kwargs:
        task.task.set_config("generation_kwargs", given.gen_kwargs, update=True)
    if config.num_fewshot is None or (given.num_fewshot is not None and config.num_fewshot != 0):
        config.num_fewshot = given.num_fewshot or 0
    if given.num_fewshot and config.num_fewshot != given.num_fewshot:
        logger.warning(
            "%s is asked with %d worked examples: --num_fewshot %d has no effect on it.",
            name,
            config.num_fewshot,
            given.num_fewshot,
        )
    if config.num_fewshot:
        # lm-eval's sampler draws one row more where it must leave out the item's own.
        num_rows = len(list(task.task.fewshot_docs())) - (task.task.fewshot_cfg.split == config.test_split)
        if config.num_fewshot > num_rows:
            raise MaskftError(
                f"{name} is to be asked with {config.num_fewshot} worked examples, but has {num_rows}; give more of "
                "them or a lower --num_fewshot."
            )


def _check_instructions(task: EvalTask) -> None:
    """Check an empty answer to each item, since what is wrong in its instructions shows there and not before."""
    for doc in task.docs():
        try:
            task.judge(doc, "")
        except (LookupError, TypeError, ValueError) as error:
            raise MaskftError(
                f"{task.name}: the instructions of the row with key {doc['key']} cannot be checked "
                f"({type(error).__name__}: {error}); correct or remove it."
            ) from error
