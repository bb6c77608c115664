"""The restore study: what gives back most of what fine-tuning took, at what price for the task (see `README.md`).

    python studies/effect/make_sums.py --num_test 300 --output_dir data/sums
    python studies/effect/prepare.py --gsm8k_dir GSM8K --codealpaca_dir CODEALPACA --output_dir data
    python studies/restore/study.py --data_dir data --gsm8k_dir GSM8K --codealpaca_dir CODEALPACA \
        --self_instruct_dir SELF_INSTRUCT --ifeval_dir IFEVAL --work_dir work --tasks sums --seeds 1 --rows 16 256

A cell is a model, a task, a seed and a number of general rows to learn from. Each method of a cell is one line of
`runs.jsonl`, and what stands there is not run again; models and masks are kept in `--work_dir`, and made again where
they are gone. All methods start from the same fine-tuned model, learn from the same rows in the same number of steps,
and choose on the same validation rows by the rule of `maskft restore`. Test rows chose nothing.
"""

import argparse
import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from general import general_prompts
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import TrainerCallback
from transformers.trainer_utils import SaveStrategy

from maskft.adapters.model_files import read_tokenizer, weights_hash
from maskft.data.rows import answered, load_rows, tokenise_rows
from maskft.data.tokens import RowTokeniser
from maskft.masks import unpack_mask
from maskft.masks.selection import select_top
from maskft.scoring.nll import NllResult, token_nll
from maskft.storage.environment import machine, versions
from maskft.training.arguments import RESTORED, DataArguments, MaskArguments, TrainingSettings
from maskft.training.restore import (
    Point,
    RestoreArguments,
    RestoreSettings,
    RestoreTrainer,
    Restoring,
    restoring_mask,
)
from maskft.training.retain import answer_rows, batches_of, read_general_rows, teach
from maskft.training.run import run_sft
from maskft.training.trainer import build_trainer, mask_group
from maskft.training.wise_ft import NUM_POINTS, scaled_changes
from maskft.tuner import check_targets, find_group
from maskft_lab.demo_model import fetch_demo_model
from maskft_lab.device import DEVICE, has_bfloat16, load_on_device
from maskft_lab.study.controls import control_masks

TASKS = {  # the best plain fine-tuning of each by validation (studies/effect); and the test rows scored
    "sums": ({"learning_rate": 2e-4, "num_train_epochs": 8, "per_device_train_batch_size": 16}, 300),
    "maths": ({"learning_rate": 1e-4, "num_train_epochs": 2, "per_device_train_batch_size": 8}, 150),
    "code": ({"learning_rate": 1e-4, "num_train_epochs": 2, "per_device_train_batch_size": 8}, 150),
    "constraints": ({"learning_rate": 3e-5, "num_train_epochs": 2, "per_device_train_batch_size": 8}, 150),
}
NUM_TASK_VALIDATION = 150
OWN_ANSWERS = ("test", "validation", "pool", "far")  # rows that the model before fine-tuning answers
FIRST_SEED, FIRST_ROWS = 1, 16  # the cell of a task in which rates are chosen, on its validation rows
BATCH_SIZE, MAX_LENGTH, MAX_NEW_TOKENS = 16, 512, 128
RATES = {"all_weights": (1e-5, 3e-5, 1e-4), "lora": (1e-4, 3e-4, 1e-3)}
TRIMMING = ("size", "ratio", "ties", "dare")
AT_THE_SHARE = (*TRIMMING, "shuffled", "drawn")
MANY, FEW = (0.75, 0.5, 0.35, 0.25, 0.15, 0.1), (0.75, 0.5, 0.25)
SHARES = {"size": MANY, "ratio": MANY, "ties": FEW, "dare": FEW}
EVAL_STEPS = 8
DEAREST = 0.15  # nats per token of the task; beyond it lies nothing that a table shows
Row = dict[str, Any]
Kept = dict[str, torch.Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("data_dir", "gsm8k_dir", "codealpaca_dir", "self_instruct_dir", "ifeval_dir", "work_dir"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--model_name_or_path", help="Default: the demo's.")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--rows", nargs="+", type=int, default=[16, 64, 256])
    parser.add_argument("--methods", nargs="+", help="Default: all.")
    parser.add_argument("--runs", type=Path, default=Path(__file__).with_name("runs.jsonl"))
    given = parser.parse_args()
    given.model_name_or_path = given.model_name_or_path or str(fetch_demo_model())
    given.work_dir.mkdir(parents=True, exist_ok=True)
    for task in given.tasks:
        for seed in given.seeds:
            cell = Cell(given, task, seed)
            for rows in (0, *given.rows):
                for method, run in methods(cell, rows).items():
                    if (not given.methods or method in given.methods) and cell.find(rows, method) is None:
                        cell.write(rows, method, timed(cell, run))


def methods(cell: "Cell", rows: int) -> dict[str, Callable[[], Row]]:
    """What runs in a cell, by its name; `rows` 0: what learns from no general rows, and so is the same for all."""
    if not rows:
        inner = [i / (NUM_POINTS - 1) for i in range(NUM_POINTS - 2, 0, -1)]
        found = {"fine_tuned": partial(fine_tuned, cell), "wise_ft": partial(put_back, cell, "wise_ft", inner)}
        return found | {kind: partial(put_back, cell, kind, SHARES[kind]) for kind in TRIMMING}
    found = {"mask": partial(learn, cell, rows, "mask", None)}
    found |= {f"{kind}_at_share": partial(put_back, cell, kind, (), rows) for kind in AT_THE_SHARE}
    found |= {kind: partial(learn_at_rates, cell, rows, kind) for kind in RATES}
    return found | {"replay": partial(replay, cell, rows)}


def timed(cell: "Cell", run: Callable[[], Row]) -> Row:
    """What a method gives, with its seconds: without the general rows' answers, and what the study alone scores."""
    assert cell.general
    began, before = time.perf_counter(), cell.untimed
    result = run()
    return {"seconds": round(time.perf_counter() - began - cell.untimed + before, 1)} | result


class Cell:
    """A model, a task and a seed: its rows, its models, and what has been written of it.

    Attributes:
        untimed: seconds spent on what is scored for the study alone.
    """

    untimed = 0.0

    def __init__(self, given: argparse.Namespace, task: str, seed: int) -> None:
        self.given, self.task, self.seed = given, task, seed
        self.base = given.model_name_or_path
        self.model_name = Path(self.base).name
        self.folder = given.work_dir / f"{self.model_name}-{task}-{seed}"
        self.tokenizer = read_tokenizer(self.base)
        self.tokenise = RowTokeniser.of(self.tokenizer, self.settings(TrainingSettings))

    def settings(self, kind: Callable[..., Any], **own: Any) -> Any:
        shared = {
            "bf16": has_bfloat16(),
            "max_length": MAX_LENGTH,
            "seed": self.seed,
            "report_to": [],
            "disable_tqdm": True,
        }
        shared |= {"per_device_train_batch_size": BATCH_SIZE, "per_device_eval_batch_size": BATCH_SIZE}
        return kind(**{"output_dir": str(self.folder / "run")} | shared | own)

    @property
    def about(self) -> Row:
        return {"model": self.model_name, "task": self.task, "seed": self.seed}

    def find(self, rows: int, method: str, **about: Any) -> Row | None:
        """The line of a method, if it has been run."""
        wanted = self.about | {"rows": rows, "method": method} | about
        lines = self.given.runs.read_text().splitlines() if self.given.runs.exists() else []
        return next((row for row in map(json.loads, lines) if wanted.items() <= row.items()), None)

    def write(self, rows: int, method: str, result: Row) -> None:
        with self.given.runs.open("a") as file:
            file.write(json.dumps(self.about | {"rows": rows, "method": method} | result) + "\n")
        print(*self.about.values(), rows, method, result["chosen"], result["seconds"], flush=True)

    @cached_property
    def task_rows(self) -> dict[str, Dataset]:
        """By split, with tokens alone."""
        sizes = {"train": None, "validation": NUM_TASK_VALIDATION, "test": TASKS[self.task][1]}
        read = {name: load_rows(str(self.given.data_dir / self.task / f"{name}.jsonl")) for name in sizes}
        return {name: self._tokens(rows.select(range(len(rows))[: sizes[name]])) for name, rows in read.items()}

    @cached_property
    def general(self) -> dict[str, Dataset]:
        """General rows with the answers of the model before fine-tuning, and test prompts with people's answers."""
        splits, folder = {}, self.folder / "general"
        folder.mkdir(parents=True, exist_ok=True)
        for name, pairs in general_prompts(self.given, self.task, self.seed).items():
            asked = max(self.given.rows) if name == "pool" else None
            rows = [self._row(*pair) for pair in pairs[:asked]]
            if name in OWN_ANSWERS:
                rows = [{"prompt": row["prompt"]} for row in rows]
            path = folder / f"{name}.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
            splits[name] = read_general_rows(str(path))
        answers = self.given.work_dir / f"{self.model_name}-answers.jsonl"
        limits = {"max_new_tokens": MAX_NEW_TOKENS, "batch_size": 48}
        with computing():
            return answer_rows(splits, self.before, self.tokenise, answers, **limits)

    def _row(self, prompt: str, answer: str) -> Row:
        if self.tokenizer.chat_template is None:
            return {"prompt": f"{prompt}\n", "completion": answer}
        turns = [{"role": "user", "content": prompt}], [{"role": "assistant", "content": answer}]
        return dict(zip(("prompt", "completion"), turns, strict=True))

    def _tokens(self, rows: Dataset) -> Dataset:
        return answered(tokenise_rows(rows, self.tokenise)).select_columns(["input_ids", "labels"])

    @cached_property
    def before(self) -> Any:
        return load_on_device(self.base)

    def tuned(self) -> Any:
        """A new copy of the fine-tuned model."""
        return load_on_device(self.fine_tune("fine_tuned", self.task_rows["train"]))

    def fine_tune(self, name: str, rows: Dataset, **own: Any) -> Path:
        """Fine-tune all weights on rows, by the best settings of the task, where that has not been done to its end."""
        folder = self.folder / name
        if not (folder / "report.json").exists():
            shared = {"save_total_limit": 1, "output_dir": str(folder), "resume_from_checkpoint": "auto"}
            settings = self.settings(TrainingSettings, **TASKS[self.task][0] | shared | own)
            data = DataArguments(model_name_or_path=self.base, dataset_name=self.task)
            run_sft(data, settings, splits=(rows, self.task_rows["validation"]))
            for checkpoint in folder.glob("checkpoint-*"):
                shutil.rmtree(checkpoint)
        return folder

    @cached_property
    def rule(self) -> Restoring:
        """How `maskft restore` chooses, between the models before fine-tuning and after it."""
        row = self.find(0, "fine_tuned")
        if row is None:
            raise SystemExit(f"The fine-tuned model of {self.about} has not been scored; run that method first.")
        if row["weights"] != weights_hash(str(self.fine_tune("fine_tuned", self.task_rows["train"]))):
            raise SystemExit(f"The fine-tuned model of {self.about} is another one now; remove its lines and models.")
        restoring = Restoring(RestoreArguments(retain_dataset_name=self.task), self.base)
        restoring.curve = [(point["at"], Point(*point["validation"])) for point in row["curve"]]
        return restoring

    def restored(self, point: Row) -> float:
        return self.rule.score(Point(*point["validation"]))[RESTORED]

    def score(self, model: Any, rows: Dataset) -> NllResult:
        with computing():
            return token_nll(model, rows, batch_size=BATCH_SIZE)

    def test(self, model: Any) -> Row:
        """What a point of a curve says of the test rows, row by row."""
        began = time.perf_counter()
        scored = {"task": self.score(model, self.task_rows["test"]), "general": self.score(model, self.general["test"])}
        point: Row = {name: result.mean for name, result in scored.items()}
        items = {name: [round(float(v), 3) for v in result.sums] for name, result in scored.items()}
        self.untimed += time.perf_counter() - began
        return point | {"items": items, "right": "".join(map(str, scored["task"].right.astype(int)))}

    def validated(self, model: Any) -> Row:
        """A point of a model that no trainer scores."""
        rows = (self.task_rows["validation"], self.general["validation"])
        return {"validation": [self.score(model, each).mean for each in rows]} | self.test(model)

    def others(self, model: Any) -> Row:
        """NLL of what enters no curve: people's answers by kind, and answers before fine-tuning to IFEval's prompts."""
        began = time.perf_counter()
        names = [name for name in self.general if name not in OWN_ANSWERS or name == "far"]
        found = {name: self.score(model, self.general[name]).mean for name in names}
        self.untimed += time.perf_counter() - began
        return found


def computing() -> torch.autocast:
    # Opened anew for each scoring, for its cache holds the weights.
    return torch.autocast(DEVICE, torch.bfloat16, enabled=has_bfloat16())


def fine_tuned(cell: Cell) -> Row:
    """The models before fine-tuning and after it, which all else lies between."""
    tuned = cell.tuned()
    curve, others = [], []
    for at, model in ((0.0, cell.before), (1.0, tuned)):
        curve.append({"at": at} | cell.validated(model))
        others.append(cell.others(model))
    scored = {"task": cell.task_rows["test"], "general": cell.general["test"]}
    counts = {name: [sum(label != -100 for label in row["labels"]) for row in rows] for name, rows in scored.items()}
    settings = TASKS[cell.task][0] | {"num_rows": len(cell.task_rows["train"])}
    told = {"settings": settings, "curve": curve, "chosen": 1.0, "others": others, "num_tokens": counts}
    told |= {"weights": weights_hash(tuned.name_or_path), "seconds": seconds_of(Path(tuned.name_or_path))}
    return told | {"bytes": 4 * tuned.num_parameters(), "versions": versions(), "machine": machine()}


def put_back(cell: Cell, kind: str, shares: Sequence[float], rows: int = 0) -> Row:
    """Points without training: the weights before fine-tuning plus a part of the change.

    Args:
        shares: of all changes, kept, from the largest on until one costs the task too much.
        rows: keep as many as the mask that learned from so many general rows instead.
    """
    tuned = cell.tuned()
    curve: list[Row] = []
    for share in between(cell, tuned, kind, shares, rows):
        curve.append({"at": share} | cell.validated(tuned))
        if curve[-1]["validation"][0] - cell.rule.curve[-1][1].task > DEAREST:
            break
    result: Row = {"settings": {}, "curve": curve, "chosen": None, "others": None, "bytes": 0}
    best = max(range(len(curve)), key=lambda number: cell.restored(curve[number]))
    if cell.restored(curve[best]) > 0:
        for share in between(cell, tuned, kind, shares[best : best + 1], rows):
            result |= {"chosen": share, "others": cell.others(tuned)}
    return result


def between(cell: Cell, tuned: Any, kind: str, shares: Sequence[float], rows: int) -> Iterator[float]:
    """Put the weights of each point into `tuned`, and give the share of the changes that it keeps."""
    if kind == "wise_ft":
        yield from scaled_changes(tuned, cell.before, shares)
        return
    config = restoring_mask(MaskArguments(reference_model_name_or_path=cell.base))
    before, after = dict(cell.before.named_modules()), dict(tuned.named_modules())
    names = check_targets(config, tuned)
    start = {name: before[name].weight.detach().cpu() for name in names}
    change = {name: after[name].weight.detach().cpu() - start[name] for name in names}
    for learned in [learned_masks(cell, rows)] if rows else [counted(change, share) for share in shares]:
        kept, scale = part_of(kind, learned, start, change, cell.seed)
        kept_share = sum(int(mask.sum()) for mask in kept.values()) / sum(mask.numel() for mask in kept.values())
        with torch.no_grad():
            for name in names:
                after[name].weight.copy_(start[name] + change[name] * kept[name] * scale)
        yield kept_share
    with torch.no_grad():
        for name in names:
            after[name].weight.copy_(start[name] + change[name])


def learned_masks(cell: Cell, rows: int) -> Kept:
    """What the mask of a cell keeps, learned again where its file is gone."""
    if not (folder := cell.folder / f"mask-{rows}").exists():
        learn(cell, rows, "mask", None)
    group = find_group(PeftModel.from_pretrained(cell.tuned(), folder), "default")
    return {name: unpack_mask(packed.cpu(), group.layers[name].in_features) for name, packed in group.masks().items()}


def counted(change: Kept, share: float) -> Kept:
    """Masks that keep a share of each tensor, no matter which."""
    return {
        name: (torch.arange(value.numel()) < round(share * value.numel())).view(value.shape)
        for name, value in change.items()
    }


def part_of(kind: str, learned: Kept, start: Kept, change: Kept, seed: int) -> tuple[Kept, float]:
    """As many changes as `learned` keeps, chosen another way, and what they are multiplied by.

    "size" and "ratio" keep the largest |change| and |change|/|weight| of each tensor, "ties" the largest |change| of
    all tensors together (arXiv 2306.01708; with one change there are no signs to elect), "dare" drawn ones, scaled up
    by the share kept (arXiv 2311.03099), "shuffled" drawn ones, as many of each tensor, and "drawn" of all together.
    """
    scale = 1.0
    if kind == "dare":
        scale = sum(mask.numel() for mask in learned.values()) / sum(int(mask.sum()) for mask in learned.values())
    if kind == "ties":
        top = select_top(list(change.values()), sum(int(mask.sum()) for mask in learned.values()), "abs")
        return dict(zip(change, top, strict=True)), scale
    if kind == "ratio":
        change = {name: value / start[name].abs().clamp(min=1e-12) for name, value in change.items()}
    named = {"size": "magnitude", "ratio": "magnitude", "dare": "random", "drawn": "random"}.get(kind, kind)
    return control_masks(named, learned, change, seed), scale


class Watch(TrainerCallback):
    """Scores the test rows at each evaluation, and keeps what validation likes best.

    Attributes:
        curve: a point for each evaluation.
        best: the values that are trained, at the best of them; None where no step gives anything back.
        at: its step.
    """

    def __init__(self, cell: Cell, start: Row) -> None:
        self.cell, self.curve, self.best, self.at = cell, [start | {"at": 0}], None, None

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Row, model: Any, **_: Any) -> None:
        point = {"at": state.global_step, "validation": [metrics["eval_loss"], metrics["eval_retained_loss"]]}
        group = mask_group(model)
        point |= {} if group is None else {"kept_share": group.kept_share()}
        if metrics[RESTORED] > max(map(self.cell.restored, self.curve)):
            self.at = state.global_step
            self.best = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        self.curve.append(point | self.cell.test(model))


def learn(cell: Cell, rows: int, kind: str, rate: float | None) -> Row:
    """A method that trains by the loop of `maskft restore`, over its mask, all weights or LoRA; the rate's default."""
    model, start = cell.tuned(), cell.find(0, "fine_tuned")["curve"][1]
    settings = cell.settings(
        RestoreSettings, eval_steps=EVAL_STEPS, **({} if rate is None else {"learning_rate": rate})
    )
    settings.save_strategy, settings.load_best_model_at_end = SaveStrategy.NO, False  # Watch keeps the best
    restoring = cell.rule
    restoring.task_rows, restoring.batch_size = cell.task_rows["validation"], BATCH_SIZE
    restoring.splits = {"retained validation": cell.general["validation"]}
    with computing():
        taught = teach(cell.before, cell.general["pool"].select(range(rows)), batch_size=BATCH_SIZE)
    restoring.batch = batches_of(taught, BATCH_SIZE // 2, cell.seed)
    if kind == "mask":
        model = get_peft_model(model, restoring_mask(MaskArguments(reference_model_name_or_path=cell.base)))
    elif kind == "lora":
        model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    watch = Watch(cell, start)
    train, validation = cell.task_rows["train"], cell.task_rows["validation"]
    trainer = build_trainer(
        model, cell.tokenizer, train, validation, settings, partial(RestoreTrainer, restoring=restoring)
    )
    trainer.add_callback(watch)
    trainer.train()
    result: Row = {"chosen": watch.at, "others": None}
    if watch.best is not None:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in watch.best:
                    parameter.copy_(watch.best[name])
        result["others"] = cell.others(model)
    shipped = cell.folder / f"{kind}-{rows}"
    if isinstance(model, PeftModel):
        model.save_pretrained(shipped)
        result["bytes"] = (shipped / "adapter_model.safetensors").stat().st_size
    else:
        result["bytes"] = 4 * model.num_parameters()
    told = {"learning_rate": settings.learning_rate, "num_steps": trainer.state.global_step}
    return {"settings": told, "curve": watch.curve} | result


def learn_at_rates(cell: Cell, rows: int, kind: str) -> Row:
    """A rival at its best rate: of all rates in the first cell of a task, by validation, and that one in the others."""
    if cell.seed != FIRST_SEED or rows != FIRST_ROWS:
        first = cell.find(FIRST_ROWS, kind, seed=FIRST_SEED)
        if first is None:
            raise SystemExit(f"The rate of {kind} is chosen with {FIRST_ROWS} rows and seed {FIRST_SEED}; run that.")
        return learn(cell, rows, kind, first["settings"]["learning_rate"])
    tried = []
    for rate in RATES[kind]:
        path = cell.folder / f"{kind}-{rate:g}.json"
        if not path.exists():
            path.write_text(json.dumps(timed(cell, partial(learn, cell, rows, kind, rate))))
        tried.append(json.loads(path.read_text()))
    best = max(tried, key=lambda result: max(map(cell.restored, result["curve"])))
    rates = {f"{one['settings']['learning_rate']:g}": max(map(cell.restored, one["curve"])) for one in tried}
    return best | {"restored_by_rate": rates}


def replay(cell: Cell, rows: int) -> Row:
    """Fine-tuning from the start with the general rows mixed in, as often as the other methods see them."""
    asked, batch = TASKS[cell.task][0], BATCH_SIZE // 2
    seen = batch * RestoreSettings(output_dir=str(cell.folder / "run")).max_steps
    own = cell.general["pool"].select([i % rows for i in range(seen)]).select_columns(["input_ids", "labels"])
    mixed = concatenate_datasets([cell.task_rows["train"]] * asked["num_train_epochs"] + [own])
    often = {"eval_strategy": "steps", "save_strategy": "steps"}
    often |= dict.fromkeys(("eval_steps", "save_steps"), 1 / asked["num_train_epochs"])
    # Else each batch of sums is padded to a general row.
    often |= {"train_sampling_strategy": "group_by_length", "num_train_epochs": 1}
    model = load_on_device(cell.fine_tune(f"replay-{rows}", mixed, **often))
    point = {"at": 1.0} | cell.validated(model)
    is_chosen = cell.restored(point) > 0
    result = {"settings": asked | {"seen": seen}, "curve": [point], "chosen": 1.0 if is_chosen else None}
    told = {"others": cell.others(model), "bytes": 4 * model.num_parameters()}
    return result | told | {"seconds": seconds_of(Path(model.name_or_path))}


def seconds_of(folder: Path) -> float:
    """Of a fine-tuning, over all its parts where it was stopped and went on."""
    seconds: float = json.loads((folder / "report.json").read_text())["seconds"]
    return round(seconds, 1)


if __name__ == "__main__":
    main()
