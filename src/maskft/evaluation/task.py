"""One task as it is asked, whoever defines it."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from maskft.evaluation.samples import Row

# lm-eval's default for tasks that name no length.
DEFAULT_MAX_NEW_TOKENS = 256


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
