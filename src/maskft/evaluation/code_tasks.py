"""Tasks whose checkers run the code that a model writes: in the sandbox, with permission, or not at all."""

import logging
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from statistics import fmean
from typing import Any, ClassVar
from unittest.mock import patch

from maskft.errors import MaskftError
from maskft.evaluation.sandbox import find_isolation, run_untrusted
from maskft.evaluation.sandboxed import NOT_PLAIN

logger = logging.getLogger(__name__)


class _SandboxedCodeEval:
    """Stands for `evaluate`'s code_eval, which would run the model's code with this process's own rights."""

    not_plain: ClassVar[Counter[str]] = Counter()  # what could not be asked of programs, since it was last told

    def compute(
        self, references: Sequence[str], predictions: Sequence[Sequence[str]], k: Sequence[int] = (1,)
    ) -> tuple[dict[str, float], dict[str, Any]]:
        passed = [
            [self._passes(program, test) for program in programs]
            for test, programs in zip(references, predictions, strict=True)
        ]
        return {f"pass@{num}": fmean(_pass_at(num, each) for each in passed) for num in k}, {}

    def _passes(self, program: str, test: str) -> bool:
        reason = run_untrusted(program, test)
        if reason.startswith(NOT_PLAIN):
            self.not_plain[reason.removeprefix(NOT_PLAIN)] += 1
        return not reason


def _pass_at(k: int, passed: Sequence[bool]) -> float:
    """The chance that one of k programs drawn from these passes (Chen et al. 2021, arXiv 2107.03374, section 2.1)."""
    return 1 - math.comb(len(passed) - sum(passed), k) / math.comb(len(passed), k)


@contextmanager
def sandboxed_code(name: str, is_allowed: bool) -> Iterator[None]:
    """Code tasks load their checker when they are imported, and try it once, or while they score: it is ours.

    Tells at its end of the programs that failed because they or their tests need more than plain values.
    """
    import evaluate

    load = evaluate.load

    def load_metric(metric: str, *args: Any, **kwargs: Any) -> Any:
        if metric != "code_eval":
            return load(metric, *args, **kwargs)
        if not is_allowed:
            raise _not_allowed(name)
        return _SandboxedCodeEval()

    with patch.object(evaluate, "load", load_metric):
        yield
    if found := _SandboxedCodeEval.not_plain:
        told = "%s: %d programs failed because their tests need more of them than plain values: %s"
        logger.warning(told, name, found.total(), "; ".join(f"{what} ({num})" for what, num in found.items()))
        found.clear()


def require_sandbox(name: str, task: Any, is_allowed: bool) -> None:
    """Refuse a task of lm-eval that runs code without permission, or outside of the sandbox."""
    functions = [metric["metric"] for metric in task.config.metric_list or []] + [task.config.process_results]
    held = [value for function in functions for value in getattr(function, "__globals__", {}).values()]
    has_sandbox = any(isinstance(value, _SandboxedCodeEval) for value in held)
    is_code = has_sandbox or getattr(task, "UNSAFE_CODE", False) or "code_eval" in map(str, functions)
    if is_code and not is_allowed:
        raise _not_allowed(name)
    if is_code and not has_sandbox:
        why = "runs code in a way of its own, or was imported before with a checker that has no sandbox"
        raise MaskftError(f"lm-eval's {name} {why}; leave it out, or start a new process.")
    if is_code:
        find_isolation()  # before a model answers


def _not_allowed(name: str) -> MaskftError:
    what = f"{name} runs the code that the model writes; only maskft eval with --allow_code_execution does so"
    return MaskftError(f"{what} (docs/how-to/eval.md says what its sandbox stops).")
