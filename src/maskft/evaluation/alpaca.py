"""AlpacaEval 2 (arXiv 2404.04475) through the package alpaca-eval: its instructions, its baseline and its judge."""

import json
import os
import warnings
from pathlib import Path
from typing import Any

from maskft.errors import MaskftError
from maskft.evaluation.samples import Row, text_hash
from maskft.evaluation.tasks import (
    ChatTemplate,
    GenerationTask,
    Item,
    TaskSettings,
    Verdict,
    choose,
    single_turn,
    unique_ids,
)

ALPACA = "alpaca_eval"
JUDGE = "weighted_alpaca_eval_gpt4_turbo"
_KEYS = ("OPENAI_API_KEY", "OPENAI_API_KEYS", "OPENAI_CLIENT_CONFIG_PATH")
_FILE = "alpaca_eval/alpaca_eval_gpt4_baseline.json"


def has_judge_key() -> bool:
    """Whether the environment names a key for the judge, which is a paid model."""
    return any(os.environ.get(key) for key in _KEYS)


def check_alpaca(data_dir: Path | None) -> None:
    """Make sure that package and data are there, before anything is loaded.

    Raises:
        MaskftError: alpaca-eval cannot be imported, or its file is missing below `data_dir`.
    """
    _package()
    if data_dir is not None and not (data_dir / _FILE).is_file():
        raise MaskftError(f"{ALPACA} needs the file {_FILE}, which is missing below {data_dir}; put it there.")


class AlpacaEvalTask(GenerationTask):
    """Instructions whose answers a judge compares with those of AlpacaEval 2's baseline.

    `win_rate` is the judge's probability that the answer is the better one, without the correction for length; its
    calls cost money, one for each answer, and a rerun asks only for what is not in `samples.jsonl`.

    Raises:
        MaskftError: alpaca-eval is not installed, its data cannot be read, or the judge gives no preference.
    """

    name = ALPACA
    max_new_tokens = 2048

    def __init__(self, name: str, settings: TaskSettings) -> None:
        package = _package()
        rows = _local_rows(settings.data_dir / _FILE) if settings.data_dir else _hub_rows(package)
        ids = unique_ids([text_hash([row["instruction"], row["output"]])[:16] for row in rows])
        items = [Item(i, row) for i, row in zip(ids, rows, strict=True)]
        self.items = choose(items, settings.limit, settings.seed)
        self.data_hash = text_hash(sorted(ids))
        # Nothing is kept in the package's own folder.
        self.judge_model = package.annotators.PairwiseAnnotator(
            annotators_config=JUDGE, caching_path=None, is_avoid_reannotations=False
        )

    def prompt(self, item: Item, chat_template: ChatTemplate | None) -> str:
        return single_turn(item.content["instruction"], chat_template)

    def judge(self, item: Item, output: str) -> Verdict:
        instruction = item.content["instruction"]
        if not output.strip():
            return Verdict({}, {"win_rate": 0.0})  # as the package has it: an empty answer loses
        (found,) = self.judge_model.annotate_head2head(
            outputs_1=[{"instruction": instruction, "output": item.content["output"]}],
            outputs_2=[{"instruction": instruction, "output": output}],
        )
        preference = found["preference"]
        if preference is None or not 1 <= preference <= 2:
            raise MaskftError("AlpacaEval's judge gave no preference; look at its account, and start again to go on.")
        return Verdict({}, {"win_rate": float(preference) - 1})

    def protocol(self) -> Row:
        return {
            "shots": 0,
            "matching": f"{JUDGE} against AlpacaEval 2's baseline, not corrected for length",
            "data": {"sha256": self.data_hash},
        }


def _local_rows(path: Path) -> list[Row]:
    try:
        rows = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise MaskftError(f"{path} cannot be read ({error}); give AlpacaEval's own JSON file.") from error
    if not isinstance(rows, list) or not all(
        isinstance(row, dict) and isinstance(row.get("instruction"), str) and isinstance(row.get("output"), str)
        for row in rows
    ):
        raise MaskftError(f'{path} must be a JSON list of {{"instruction": "...", "output": "..."}}.')
    return rows


def _hub_rows(package: Any) -> list[Row]:
    return [dict(row) for row in package.constants.ALPACAEVAL_REFERENCE_OUTPUTS_2()]


def _package() -> Any:
    try:
        with warnings.catch_warnings():
            # It imports pkg_resources, which says at each import that it will go.
            warnings.simplefilter("ignore")
            import alpaca_eval
            import alpaca_eval.annotators
    except ImportError as error:
        raise MaskftError(f"{ALPACA} needs the package alpaca-eval ({error}): pip install 'maskft[alpaca]'.") from error
    return alpaca_eval
