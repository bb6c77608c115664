"""Tasks whose checkers run the code that a model writes: in the sandbox, with permission, or not at all."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from statistics import fmean
from typing import Any
from unittest.mock import patch

from maskft.errors import MaskftError
from maskft.evaluation.sandbox import run_untrusted
from maskft.evaluation.task import EvalTask

_TIMEOUT_S = 10.0
_MEMORY_BYTES = 2 * 1024**3


class _SandboxedCodeEval:
    """Stands for `evaluate`'s code_eval, which would run the model's code in this process's own user and folders."""

    def compute(
        self, references: Sequence[str], predictions: Sequence[Sequence[str]], k: Sequence[int] = (1,)
    ) -> tuple[dict[str, float], dict[str, Any]]:
        passed = [
            [
                run_untrusted(f"{program}\n{test}", timeout_s=_TIMEOUT_S, memory_bytes=_MEMORY_BYTES).passed
                for program in programs
            ]
            for test, programs in zip(references, predictions, strict=True)
        ]
        return {f"pass@{num}": fmean(_pass_at(num, each) for each in passed) for num in k}, {}


def _pass_at(k: int, passed: Sequence[bool]) -> float:
    """The chance that one of k programs drawn from these passes (Chen et al. 2021, arXiv 2107.03374, section 2.1)."""
    return 1 - math.comb(len(passed) - sum(passed), k) / math.comb(len(passed), k)


def _load_metric(load: Callable[..., Any], name: str, is_allowed: bool, metric: str, *args: Any, **kwargs: Any) -> Any:
    if metric != "code_eval":
        return load(metric, *args, **kwargs)
    if not is_allowed:
        raise not_allowed(name)
    return _SandboxedCodeEval()


def sandboxed_code(name: str, is_allowed: bool) -> Any:
    """Code tasks load their checker when they are imported, and try it once, or while they score: it is ours."""
    import evaluate

    return patch.object(evaluate, "load", partial(_load_metric, evaluate.load, name, is_allowed))


def require_sandbox(task: EvalTask) -> None:
    """Refuse a task that runs code without permission, or outside of the sandbox."""
    config = task.task.config
    functions = [metric["metric"] for metric in config.metric_list or []] + [config.process_results]
    has_sandbox = any(
        isinstance(value, _SandboxedCodeEval)
        for function in functions
        for value in getattr(function, "__globals__", {}).values()
    )
    is_code = has_sandbox or getattr(task.task, "UNSAFE_CODE", False) or "code_eval" in map(str, functions)
    if is_code and not task.settings.allow_code_execution:
        raise not_allowed(task.name)
    if is_code and not has_sandbox:
        raise MaskftError(
            f"lm-eval's {task.name} runs code in a way of its own, or was imported before with a checker that has no "
            "sandbox; leave it out, or start a new process."
        )


def not_allowed(name: str) -> MaskftError:
    return MaskftError(
        f"{name} runs the code that the model writes; only maskft eval with --allow_code_execution does so "
        "(docs/evaluation.md says what its sandbox stops)."
    )
