"""Rows for instruction following: a model's own answers that pass the checkers of IFEval's kinds of constraint.

Each instruction is written several times with one or two constraints, worded and checked by lm-eval's own classes. The
demo's model, shown a worked example of each constraint, answers; answers that end by themselves and pass all checks are
kept, without the examples. Instructions, not prompts, are split, so that no test instruction was trained on. Prompts of
IFEval itself must not be given. `SPLIT_prompts.jsonl` hold all prompts, with no answers.

    python studies/effect/make_constraints.py seed_tasks.jsonl user_oriented_instructions.jsonl \
        --output_dir constraints --num_train 600 --num_validation 150 --num_test 250

The files are in self-instruct's form: `instruction` and `instances` with `input` and `output`. A killed run goes on,
since `OUTPUT_DIR/samples.jsonl` keeps every answer; `train.jsonl`, `validation.jsonl`, `test.jsonl` and `counts.json`
come last.
"""

import argparse
import json
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from maskft.evaluation.generation import generate_answers
from maskft.evaluation.local_data import ensure_punkt
from maskft.storage.json_text import json_hash
from maskft_lab.demo_model import fetch_demo_model
from maskft_lab.device import has_bfloat16, load_on_device
from maskft_lab.study.checkers import row_checker

ensure_punkt()  # before the import below, which would download it
from lm_eval.tasks.ifeval.instructions_registry import (  # noqa: E402
    INSTRUCTION_CONFLICTS,
    INSTRUCTION_DICT,
    conflict_make,
)

MAX_PROMPT_TOKENS = 120
COPIED_WORDS = 4
SPLITS = ("test", "validation", "train")
ENDINGS = ("That is all.", "Hope this helps!", "Let me know what you think.")
COMMON_WORDS = (
    "can",
    "will",
    "you",
    "your",
    "important",
    "also",
    "help",
    "because",
    "which",
    "include",
    "make",
    "they",
)
SYSTEM = "You give short answers and follow every instruction to the letter."
WORD = re.compile(r"[a-z]{5,12}")


@dataclass(frozen=True)
class Kind:
    """A kind of constraint: how its settings are drawn, and a worked example that shows the model what is meant."""

    draw: Callable[[random.Random, Sequence[str]], dict[str, Any]]
    question: str
    settings: dict[str, Any]
    answer: str


KINDS = {
    "change_case:english_lowercase": Kind(
        lambda draw, words: {},
        "Where do penguins live?",
        {},
        "most penguins live near the cold seas of the south, far away from polar bears.",
    ),
    "change_case:english_capital": Kind(
        lambda draw, words: {},
        "Why do we sleep?",
        {},
        "SLEEP GIVES THE BODY AND THE MIND TIME TO REST AND TO REPAIR THEMSELVES.",
    ),
    "change_case:capital_word_frequency": Kind(
        lambda draw, words: {"capital_frequency": draw.choice([1, 2, 3]), "capital_relation": "at least"},
        "Should I learn to swim?",
        {"capital_frequency": 2, "capital_relation": "at least"},
        "YES, learning to swim keeps you safe near water and is GREAT exercise at any AGE.",
    ),
    "punctuation:no_comma": Kind(
        lambda draw, words: {},
        "What is in a fruit salad?",
        {},
        "A fruit salad has apples and pears and grapes with a little lemon juice.",
    ),
    "startend:quotation": Kind(
        lambda draw, words: {},
        "Write a greeting for a shop.",
        {},
        '"Welcome in! Everything fresh today is on the table by the door."',
    ),
    "startend:end_checker": Kind(
        lambda draw, words: {"end_phrase": draw.choice(ENDINGS)},
        "How do I boil an egg?",
        {"end_phrase": "Enjoy your meal."},
        "Put the egg into boiling water and take it out after eight minutes. Enjoy your meal.",
    ),
    "detectable_format:title": Kind(
        lambda draw, words: {},
        "Describe the sea.",
        {},
        "<<The Sea>>\nThe sea is wide and blue, and it never holds still.",
    ),
    "detectable_format:number_bullet_lists": Kind(
        lambda draw, words: {"num_bullets": draw.choice([2, 3, 4])},
        "What should I pack for the beach?",
        {"num_bullets": 3},
        "* A towel\n* Sun cream\n* A bottle of water",
    ),
    "detectable_format:number_highlighted_sections": Kind(
        lambda draw, words: {"num_highlights": draw.choice([1, 2])},
        "How can I save energy at home?",
        {"num_highlights": 2},
        "*Turn the lights off* when you leave a room, and *wash at a low temperature*.",
    ),
    "detectable_content:postscript": Kind(
        lambda draw, words: {"postscript_marker": "P.S."},
        "Tell a neighbour that the parcel is here.",
        {"postscript_marker": "P.S."},
        "Your parcel came this morning and is waiting at our door.\n\nP.S. It is rather heavy.",
    ),
    "keywords:existence": Kind(
        lambda draw, words: {"keywords": draw.sample(words, 2)},
        "What makes a good garden?",
        {"keywords": ["sunlight", "water"]},
        "A good garden has rich soil, plenty of sunlight and enough water.",
    ),
    "keywords:forbidden_words": Kind(
        lambda draw, words: {"forbidden_words": draw.sample(COMMON_WORDS, 3)},
        "How do I stay healthy?",
        {"forbidden_words": ["you", "will", "help"]},
        "Eat plenty of vegetables, walk every day and sleep eight hours.",
    ),
    "keywords:frequency": Kind(
        lambda draw, words: {"keyword": draw.choice(words), "frequency": 2, "relation": "at least"},
        "What is a river?",
        {"keyword": "water", "frequency": 2, "relation": "at least"},
        "A river is water that flows from the hills, and its water ends in the sea.",
    ),
    "length_constraints:number_words": Kind(
        lambda draw, words: {
            "num_words": draw.choice([15, 25, 40]),
            "relation": draw.choice(["less than", "at least"]),
        },
        "Why is the sky blue?",
        {"num_words": 20, "relation": "less than"},
        "Air scatters blue light more than red light, so blue reaches us from everywhere.",
    ),
    "length_constraints:number_sentences": Kind(
        lambda draw, words: {
            "num_sentences": draw.choice([2, 3]),
            "relation": draw.choice(["less than", "at least"]),
        },
        "What is a cat?",
        {"num_sentences": 2, "relation": "at least"},
        "A cat is a small animal that many people keep at home. It hunts mice. It sleeps most of the day.",
    ),
}
# The second constraint of most pairs: it keeps answers short, and goes with all others.
SHORT = ("length_constraints:number_words", "length_constraints:number_sentences")


@dataclass(frozen=True)
class Prompt:
    """An instruction with its constraints, in IFEval's own form."""

    instruction: str
    text: str
    instruction_id_list: list[str]
    kwargs: list[dict[str, Any]]

    @property
    def id(self) -> str:
        return json_hash(asdict(self))[:16]


def read_instructions(paths: Sequence[str]) -> dict[str, str]:
    """Each instruction with its input, and the example answer, whose words serve as keywords."""
    found = {}
    for path in paths:
        for line in Path(path).read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            for instance in row["instances"]:
                text = "\n".join(part.strip() for part in (row["instruction"], instance["input"]) if part.strip())
                found[text] = instance["output"]
    return found


def write_prompts(instruction: str, example: str, variants: int, draw: random.Random) -> list[Prompt]:
    """The instruction with different constraints; one in six prompts has two, which the model rarely meets."""
    conflicts = conflict_make(INSTRUCTION_CONFLICTS)
    words = sorted(set(WORD.findall(f"{instruction} {example}".lower())))
    kinds = [kind for kind in KINDS if len(words) > 1 or kind not in ("keywords:existence", "keywords:frequency")]
    prompts = []
    for first in draw.sample(kinds, min(variants, len(kinds))):
        chosen = [first]
        if draw.random() < 1 / 6:
            others = SHORT if first not in SHORT else kinds
            chosen += draw.sample([kind for kind in others if kind not in conflicts[first]], 1)
        settings = [KINDS[kind].draw(draw, words) for kind in chosen]
        prompts.append(Prompt(instruction, worded(instruction, chosen, settings), chosen, settings))
    return prompts


def worded(instruction: str, kinds: Sequence[str], settings: Sequence[dict[str, Any]]) -> str:
    """The instruction, and below it the constraints in lm-eval's words."""
    wording = [INSTRUCTION_DICT[k](k).build_description(**s) for k, s in zip(kinds, settings, strict=True)]
    return f"{instruction}\n\n{' '.join(wording)}"


def shown_to_the_model(prompt: Prompt) -> list[dict[str, str]]:
    """The prompt behind a worked example of each of its constraints; rows that are written hold the prompt alone."""
    turns = []
    for kind in prompt.instruction_id_list:
        example = KINDS[kind]
        turns.append({"role": "user", "content": worded(example.question, [kind], [example.settings])})
        turns.append({"role": "assistant", "content": example.answer})
    return [{"role": "system", "content": SYSTEM}, *turns, user_message(prompt)]


def split_of(instructions: Sequence[str], sizes: dict[str, int], seed: int) -> dict[str, str]:
    """The split of each instruction, in proportion to the rows wanted."""
    shuffled = sorted(instructions)
    random.Random(seed).shuffle(shuffled)
    names: dict[str, str] = {}
    start = 0.0
    for split in SPLITS:
        end = start + len(shuffled) * sizes[split] / sum(sizes.values())
        names |= dict.fromkeys(shuffled[round(start) : round(end)], split)
        start = end
    return names


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("instructions", nargs="+")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--num_train", type=int, default=600)
    parser.add_argument("--num_validation", type=int, default=150)
    parser.add_argument("--num_test", type=int, default=250)
    parser.add_argument("--variants", type=int, default=4, help="prompts written for each instruction")
    parser.add_argument("--draws", type=int, default=2, help="answers drawn for a prompt until one passes")
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--max_new_tokens", type=int, default=64)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--limit", type=int, help="use so many instructions only")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()

    for kind, example in KINDS.items():
        checker = INSTRUCTION_DICT[kind](kind)
        checker.build_description(**example.settings)
        if not checker.check_following(example.answer):
            raise SystemExit(f"The worked example of {kind} does not pass its own check.")
    folder = fetch_demo_model()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    examples = read_instructions(given.instructions)
    draw = random.Random(given.seed)
    prompts = [p for text, example in examples.items() for p in write_prompts(text, example, given.variants, draw)]
    lengths = [len(ids) for ids in tokenizer([p.text for p in prompts])["input_ids"]]
    prompts = [p for p, length in zip(prompts, lengths, strict=True) if length <= MAX_PROMPT_TOKENS]
    sizes = {"train": given.num_train, "validation": given.num_validation, "test": given.num_test}
    splits = split_of([*dict.fromkeys(p.instruction for p in prompts)][: given.limit], sizes, given.seed)
    prompts = [p for p in prompts if p.instruction in splits]
    print(f"{len(splits)} instructions, {len(prompts)} prompts", flush=True)

    passes = Passes(prompts)
    sample(prompts, folder, tokenizer, passes, given)
    drawn = [row for row in read_answers(given.output_dir) if row["draw"] < given.draws]
    samples = [row | {"passes": passes(row)} for row in drawn]
    write_rows(prompts, samples, splits, sizes, given)


class Passes:
    """Whether a drawn answer ended by itself, holds to all constraints, and is no copy of a worked example."""

    def __init__(self, prompts: Sequence[Prompt]) -> None:
        self.places = {prompt.id: place for place, prompt in enumerate(prompts)}
        self.is_right = row_checker("ifeval", [as_row(prompt) for prompt in prompts])

    def __call__(self, row: dict[str, Any]) -> bool:
        text = row["output"]
        return row["ended"] and self.is_right(self.places[row["item"]], text) and not copies_an_example(text)


def read_answers(output_dir: Path) -> list[dict[str, Any]]:
    """The answers drawn so far; a last line that was cut short is left out."""
    path = output_dir / "samples.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def sample(prompts: list[Prompt], folder: Path, tokenizer: Any, passes: Passes, given: argparse.Namespace) -> None:
    """Draw answers, one round for all prompts, the next for those without a passing answer, and so on."""
    model = load_on_device(folder).to(torch.bfloat16 if has_bfloat16() else torch.float32)
    given.output_dir.mkdir(parents=True, exist_ok=True)
    rows = read_answers(given.output_dir)
    (given.output_dir / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shown = [shown_to_the_model(p) for p in prompts]
    lengths = [len(ids) for ids in tokenizer.apply_chat_template(shown, return_dict=True)["input_ids"]]
    settings = {"max_new_tokens": given.max_new_tokens, "batch_size": given.batch_size}
    for number in range(given.draws):
        solved = {row["item"] for row in rows if row["draw"] < number and passes(row)}
        drawn = {row["item"] for row in rows if row["draw"] == number}
        left = [i for i, p in enumerate(prompts) if p.id not in solved | drawn]
        left.sort(key=lambda i: (lengths[i], prompts[i].id))
        for start in range(0, len(left), given.batch_size):
            here = left[start : start + given.batch_size]
            torch.manual_seed(given.seed * 10**6 + number * 10**5 + start)
            asked = [shown[i] for i in here]
            drawn_answers = generate_answers(model, tokenizer, asked, temperature=given.temperature, **settings)
            new = [
                {"item": prompts[i].id, "draw": number, "output": text.strip(), "ended": ended}
                for i, text, ended in zip(here, *drawn_answers, strict=True)
            ]
            with (given.output_dir / "samples.jsonl").open("a", encoding="utf-8") as file:
                file.write("".join(json.dumps(row) + "\n" for row in new))
            rows += new
            print(f"draw {number}: {len(rows)} answers", flush=True)


def runs_of_words(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"[a-z']+", text.lower())
    return {tuple(words[i : i + COPIED_WORDS]) for i in range(len(words) - COPIED_WORDS + 1)}


def copies_an_example(text: str) -> bool:
    """Whether an answer repeats part of a worked example: it would pass the checks for the example's sake."""
    return any(runs_of_words(text) & runs_of_words(kind.answer) for kind in KINDS.values())


def user_message(prompt: Prompt) -> dict[str, str]:
    return {"role": "user", "content": prompt.text}


def as_row(prompt: Prompt, answer: str = "") -> dict[str, Any]:
    return {
        "prompt": [user_message(prompt)],
        "completion": [{"role": "assistant", "content": answer}],
        "instruction_id_list": prompt.instruction_id_list,
        "kwargs": prompt.kwargs,
    }


def write_rows(
    prompts: list[Prompt],
    samples: list[dict[str, Any]],
    splits: dict[str, str],
    sizes: dict[str, int],
    given: argparse.Namespace,
) -> None:
    """The splits' files and the counts; prompts in random order, of those with a passing answer as many as wanted."""
    by_prompt: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in samples:
        by_prompt[row["item"]].append(row)
    shuffled = list(prompts)
    random.Random(given.seed).shuffle(shuffled)
    counts: dict[str, Any] = {"num_prompts": len(prompts), "num_answers": len(samples), "splits": {}}
    for split in SPLITS:
        rows, instructions = [], set()
        mine = [p for p in shuffled if splits[p.instruction] == split]
        for prompt in mine:
            passing = [row["output"] for row in by_prompt[prompt.id] if row["passes"]]
            if passing and len(rows) < sizes[split]:
                instructions.add(prompt.instruction)
                rows.append(as_row(prompt, passing[0]))
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (given.output_dir / f"{split}.jsonl").write_text(text, encoding="utf-8")
        everything = "".join(json.dumps(as_row(p), ensure_ascii=False) + "\n" for p in mine)
        (given.output_dir / f"{split}_prompts.jsonl").write_text(everything, encoding="utf-8")
        counts["splits"][split] = {"prompts": len(mine), "rows": len(rows), "instructions": len(instructions)}

    tally: dict[str, Counter[str]] = defaultdict(Counter)
    by_id = {p.id: p for p in prompts}
    for row in samples:
        if row["draw"] == 0:  # later draws are of the prompts that the first ones failed
            for kind in by_id[row["item"]].instruction_id_list:
                tally[kind].update(answers=1, ended=row["ended"], passed=row["passes"])
    counts["first_draw"] = {
        "answers": sum(row["draw"] == 0 for row in samples),
        "ended": sum(row["draw"] == 0 and row["ended"] for row in samples),
        "passed": sum(row["draw"] == 0 and row["passes"] for row in samples),
        "by_kind": {kind: dict(tally[kind]) for kind in sorted(tally)},
    }
    (given.output_dir / "counts.json").write_text(json.dumps(counts, indent=1) + "\n")
    print(json.dumps(counts, indent=1))


if __name__ == "__main__":
    main()
