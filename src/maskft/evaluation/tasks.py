"""The tasks of an evaluation: lm-eval's, by name, group, tag or YAML file, and kinds that go by KIND:WHAT.

Kinds are entry points of the group `maskft.tasks`: functions of the whole name, `limit` and `seed` that give a task in
lm-eval's form.
"""

import logging
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, cached_property
from importlib.metadata import EntryPoint, entry_points
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from maskft.errors import MaskftError, first_line, nearest
from maskft.evaluation.code_tasks import require_sandbox, sandboxed_code
from maskft.evaluation.local_data import ensure_punkt, served
from maskft.evaluation.samples import Row

logger = logging.getLogger(__name__)

DEFAULT_MAX_NEW_TOKENS = 256  # lm-eval's, for tasks that name no length


@dataclass(frozen=True)
class TaskSettings:
    """What tasks are loaded with; `seed` None is lm-eval's own seeds, `gen_kwargs` goes over those of the tasks."""

    data_dir: str | Path | None = None
    include_path: str | None = None
    num_fewshot: int | None = None
    limit: float | None = None
    seed: int | None = None
    gen_kwargs: Row = field(default_factory=dict)
    allow_code_execution: bool = False


@dataclass
class EvalTask:
    """One of lm-eval's tasks (`task`) as it is asked.

    `groups`: of each that it belongs to, `num_tasks` and `metrics` of the whole, with whether tasks count by size.
    """

    name: str
    task: Any
    settings: TaskSettings
    groups: dict[str, Row] = field(default_factory=dict)

    @property
    def generation(self) -> Row | None:
        """The settings of generation with their `max_gen_toks`; None where nothing is generated."""
        from lm_eval.models.utils import normalize_gen_kwargs

        if self.task.OUTPUT_TYPE != "generate_until":
            return None
        given = self.task.config.generation_kwargs
        # lm-eval knows the longest answer by four names.
        return given | {"max_gen_toks": normalize_gen_kwargs(given, DEFAULT_MAX_NEW_TOKENS)["max_gen_toks"]}

    @property
    def is_nll(self) -> bool:
        """Whether it is the loss of given rows, which go to the model as training would send them."""
        return self.name.startswith("nll:")

    @cached_property
    def docs(self) -> list[Row]:
        """The items that are asked, in order."""
        from lm_eval.evaluator_utils import get_sample_size

        return list(islice(self.task.eval_docs, get_sample_size(self.task, self.settings.limit)))

    @contextmanager
    def seeded(self, draw: int = 0) -> Iterator[None]:
        """lm-eval's seeds, or all of them `seed`; the generators go on as they were when the block ends."""
        given = self.settings.seed
        python_seed, seed = (0, 1234) if given is None else (given, given)
        states = random.getstate(), np.random.get_state()
        with torch.random.fork_rng():
            self.task.set_fewshot_seed(seed)
            random.seed(python_seed)
            np.random.seed(seed)
            torch.manual_seed(seed + draw)
            try:
                yield
            finally:
                random.setstate(states[0])
                np.random.set_state(states[1])

    def judge(self, doc: Row, output: str) -> Row:
        """What the task's checker makes of an output: a value by `metric,filter`; the same each time."""
        from lm_eval.api.instance import Instance

        instance = Instance("generate_until", doc, ("", {}), 0, resps=[output])
        values: Row = {}
        with self.seeded():
            for pipeline in self.task._filters:
                pipeline.apply([instance])
                metrics = self.task.process_results(doc, [instance.filtered_resps[pipeline.name]])
                values |= {f"{metric},{pipeline.name}": value for metric, value in metrics.items()}
        return values


def load_tasks(names: str, settings: TaskSettings) -> list[EvalTask]:
    """The tasks of a comma-separated list, those of groups and tags one by one."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    found: dict[str, EvalTask] = {}
    for name in dict.fromkeys(name.strip() for name in names.split(",")):
        for task in _load(name, settings):
            first = found.setdefault(task.name, task)
            first.groups.update(task.groups)
            if first is not task and str(first.task.dump_config()) != str(task.task.dump_config()):
                raise MaskftError(f"--tasks names two tasks {task.name} that differ; rename one, or leave it out.")
    for task in found.values():
        require_sandbox(task.name, task.task, settings.allow_code_execution)
        _configure(task)
        if task.name == "ifeval":
            _check_instructions(task)
    return list(found.values())


def _load(name: str, settings: TaskSettings) -> list[EvalTask]:
    nll = EntryPoint("nll", "maskft.evaluation.language_model:nll_task", "maskft.tasks")
    kinds = {point.name: point for point in (nll, *entry_points(group=nll.group))}
    kind, colon, _ = name.partition(":")
    if colon and kind in kinds:
        make = kinds[kind].load()
        return [EvalTask(name, make(name, limit=settings.limit, seed=settings.seed), settings)]
    manager = _manager_for(name, settings.include_path)
    if name not in manager.all_tasks and not Path(name).is_file():
        known = nearest(name, [*manager.all_tasks, *(f"{kind}:NAME" for kind in kinds)])
        hint = "write answers with examples/alpaca_eval.py" if name == "alpaca_eval" else "correct its name"
        raise MaskftError(f"There is no task {name!r}{known}; {hint}.")
    loaded = _load_lm_eval(manager, name, settings)
    tasks = [EvalTask(leaf, task, settings) for leaf, task in loaded["tasks"].items()]
    for group in loaded["groups"].values():
        leaves = {task.task_name for task in group.get_all_tasks()}
        metrics = {metric.metric: metric.weight_by_size for metric in group.aggregate_metric_list or []}
        for task in tasks:
            if metrics and task.name in leaves:
                task.groups[group.name] = {"num_tasks": len(leaves), "metrics": metrics}
    return tasks


def _load_lm_eval(manager: Any, name: str, settings: TaskSettings) -> Any:
    if "ifeval" in name:
        ensure_punkt()
        import langdetect

        # Without a seed its verdicts on short texts change from run to run.
        langdetect.DetectorFactory.seed = 0
    try:
        with served(name, settings.data_dir), sandboxed_code(name, settings.allow_code_execution):
            return manager.load([name])
    except MaskftError:
        raise
    except (OSError, ValueError, RuntimeError, LookupError, TypeError, ImportError) as error:
        hint = "docs/how-to/eval.md says what its files hold."
        if settings.data_dir is None:
            hint = "without the hub, give local files: --data_dir of maskft eval, --eval_data_dir of a training run."
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise MaskftError(f"{name} with its data cannot be used ({reason}); {hint}") from error


def _manager_for(name: str, include_path: str | None) -> Any:
    """An index that holds `name`: of the folders a task may lie in, for an index of all 14,000 takes 10 s."""
    import lm_eval.tasks

    root = Path(lm_eval.tasks.__file__).parent
    folders = tuple(sorted(str(f) for f in root.iterdir() if f.is_dir() and name.startswith(f.name)))
    few = _manager(folders, include_path)
    is_task = name in few.all_subtasks or (
        Path(name).is_file() and "group:" not in Path(name).read_text(encoding="utf-8")
    )
    return few if is_task else _manager(None, include_path)


@cache
def _manager(folders: tuple[str, ...] | None, include_path: str | None) -> Any:
    from lm_eval.tasks import TaskManager

    included = [include_path] if include_path else []
    return TaskManager(include_path=[*(folders or ()), *included], include_defaults=folders is None)


def _configure(task: EvalTask) -> None:
    """Put the settings over the task's own, by lm-eval's rule: a definition without shots stays without."""
    given, config, name = task.settings, task.task.config, task.name
    if task.task.OUTPUT_TYPE == "generate_until" and given.gen_kwargs:
        task.task.set_config("generation_kwargs", given.gen_kwargs, update=True)
        try:
            _ = task.generation
        except (TypeError, ValueError) as error:
            raise MaskftError(f"--gen_kwargs {given.gen_kwargs} cannot be used: {first_line(error)}.") from error
    if config.num_fewshot is None or (given.num_fewshot is not None and config.num_fewshot != 0):
        config.num_fewshot = given.num_fewshot or 0
    shots = config.num_fewshot
    if given.num_fewshot and shots != given.num_fewshot:
        told = "%s is asked with %d worked examples: --num_fewshot %d has no effect on it."
        logger.warning(told, name, shots, given.num_fewshot)
    # lm-eval's sampler draws one row more where it must leave out the item's own.
    own = task.task.fewshot_cfg.split == config.test_split
    if shots and shots > (num_rows := len(list(task.task.fewshot_docs())) - own):
        hint = "give more of them or a lower --num_fewshot."
        raise MaskftError(f"{name} is to be asked with {shots} worked examples, but has {num_rows}; {hint}")


def _check_instructions(task: EvalTask) -> None:
    """Check an empty answer to each item, since what is wrong in its instructions shows there and not before."""
    for doc in task.docs:
        try:
            task.judge(doc, "")
        except (LookupError, TypeError, ValueError) as error:
            what = f"the instructions of the row with key {doc['key']} cannot be checked"
            reason = f"({type(error).__name__}: {error}); correct or remove it."
            raise MaskftError(f"{task.name}: {what} {reason}") from error
