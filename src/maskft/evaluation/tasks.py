"""The tasks of an evaluation: lm-eval's, by name, group, tag or YAML file, and two kinds of our own in its form."""

import logging
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from maskft.errors import MaskftError, first_line, nearest
from maskft.evaluation.local_data import replaced, served
from maskft.evaluation.punkt import ensure_punkt
from maskft.evaluation.samples import Row

logger = logging.getLogger(__name__)

# lm-eval's default for tasks that name no length.
DEFAULT_MAX_NEW_TOKENS = 256
OWN_KINDS = ("nll:", "reasoning_gym:")


@dataclass(frozen=True)
class TaskSettings:
    """What tasks are loaded with; `seed` None is lm-eval's own seeds, `gen_kwargs` goes over those of the tasks."""

    data_dir: Path | None = None
    include_path: str | None = None
    num_fewshot: int | None = None
    limit: float | None = None
    seed: int | None = None
    gen_kwargs: dict[str, Any] = field(default_factory=dict)
    allow_code_execution: bool = False


@dataclass
class EvalTask:
    """One of lm-eval's tasks as it is asked.

    Attributes:
        task: lm-eval's object.
        groups: by name of each group it belongs to, `num_tasks` and the `metrics` of its whole, each with whether tasks
            count by their size.
    """

    name: str
    task: Any
    settings: TaskSettings
    groups: dict[str, Row] = field(default_factory=dict)

    @property
    def generation(self) -> dict[str, Any] | None:
        """The settings of generation; None where nothing is generated."""
        return dict(self.task.config.generation_kwargs) if self.task.OUTPUT_TYPE == "generate_until" else None

    @property
    def is_nll(self) -> bool:
        """Whether it is the loss of given rows, which go to the model as training would send them."""
        return self.name.startswith("nll:")

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

    def judge(self, doc: Row, output: str) -> dict[str, Any]:
        """What the task's checker makes of an output: a value by `metric,filter`; the same each time."""
        from lm_eval.api.instance import Instance

        instance = Instance("generate_until", doc, ("", {}), 0, resps=[output])
        values: dict[str, Any] = {}
        with self.seeded():
            for pipeline in self.task._filters:
                pipeline.apply([instance])
                metrics = self.task.process_results(doc, [instance.filtered_resps[pipeline.name]])
                values |= {f"{metric},{pipeline.name}": value for metric, value in metrics.items()}
        return values


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
    manager = _manager_for(name, settings.include_path)
    if name not in manager.all_tasks and not Path(name).is_file():
        known = [*manager.all_tasks, *(f"{kind}NAME" for kind in OWN_KINDS)]
        raise MaskftError(f"There is no task {name!r}{nearest(name, known)}; correct its name.")
    if "ifeval" in name:
        _prepare_ifeval()
    try:
        with served(name, settings.data_dir, documents), sandboxed_code(name, settings.allow_code_execution):
            loaded = manager.load([name])
    except MaskftError:
        raise
    except (OSError, ValueError, RuntimeError, LookupError, TypeError, ImportError) as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        if documents is not None or settings.data_dir is not None:
            raise MaskftError(
                f"The rows of {name} cannot be used ({reason}); docs/evaluation.md says what its files hold."
            ) from error
        raise MaskftError(
            f"{name} cannot be loaded with its data ({reason}); where the hub is out of reach, give a folder of local "
            "files: --data_dir of maskft eval, --eval_data_dir of a training run."
        ) from error
    tasks = [EvalTask(leaf, task, settings) for leaf, task in loaded["tasks"].items()]
    for group in loaded["groups"].values():
        leaves = {task.task_name for task in group.get_all_tasks()}
        metrics = {metric.metric: metric.weight_by_size for metric in group.aggregate_metric_list or []}
        for task in tasks:
            if metrics and task.name in leaves:
                task.groups[group.name] = {"num_tasks": len(leaves), "metrics": metrics}
    return tasks


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
    _require_sandbox(task)
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


# --- code that a model wrote -----------------------------------------------------------------------------

_CODE_TIMEOUT_S = 10.0
_CODE_MEMORY_BYTES = 2 * 1024**3


class _SandboxedCodeEval:
    """Stands for `evaluate`'s code_eval, which would run the model's code in this process's own user and folders."""

    def compute(
        self, references: Sequence[str], predictions: Sequence[Sequence[str]], k: Sequence[int] = (1,)
    ) -> tuple[dict[str, float], dict[str, Any]]:
        from maskft.evaluation.sandbox import run_untrusted

        if list(k) != [1]:
            raise MaskftError("Only pass@1 is computed; give --num_samples for a finer estimate of it.")
        results = [
            run_untrusted(f"{program}\n{test}", timeout_s=_CODE_TIMEOUT_S, memory_bytes=_CODE_MEMORY_BYTES)
            for test, programs in zip(references, predictions, strict=True)
            for program in programs
        ]
        passed = sum(result.passed for result in results) / len(results)
        return {"pass@1": passed}, {"reasons": [result.reason for result in results]}


def _load_metric(load: Callable[..., Any], name: str, is_allowed: bool, metric: str, *args: Any, **kwargs: Any) -> Any:
    if metric != "code_eval":
        return load(metric, *args, **kwargs)
    if not is_allowed:
        raise _not_allowed(name)
    return _SandboxedCodeEval()


@contextmanager
def sandboxed_code(name: str, is_allowed: bool) -> Iterator[None]:
    """Code tasks load their checker when they are imported, and try it once, or while they score: it is ours."""
    import evaluate

    with replaced(evaluate, "load", partial(_load_metric, evaluate.load, name, is_allowed)):
        yield


def _require_sandbox(task: EvalTask) -> None:
    """Refuse a task that runs code without permission, or outside of the sandbox.

    Raises:
        MaskftError: as it says.
    """
    config = task.task.config
    functions = [metric["metric"] for metric in config.metric_list or []] + [config.process_results]
    has_sandbox = any(
        isinstance(value, _SandboxedCodeEval)
        for function in functions
        for value in getattr(function, "__globals__", {}).values()
    )
    is_code = has_sandbox or getattr(task.task, "UNSAFE_CODE", False) or "code_eval" in map(str, functions)
    if is_code and not task.settings.allow_code_execution:
        raise _not_allowed(task.name)
    if is_code and not has_sandbox:
        raise MaskftError(
            f"lm-eval's {task.name} runs code in a way of its own, or was imported before with a checker that has no "
            "sandbox; leave it out, or start a new process."
        )


def _not_allowed(name: str) -> MaskftError:
    return MaskftError(
        f"{name} runs the code that the model writes; only maskft eval with --allow_code_execution does so "
        "(docs/evaluation.md says what its sandbox stops)."
    )
