"""What the documents show is what runs: their Python, on a tiny model, and the flags that they name."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from flag_tables import on_page_markdown
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from maskft import MaskCallback, MaskConfig, cli, find_group

ROOT = Path(__file__).parent.parent
NAME = "my-fine-tuned-model"
# As the comment beside it says, and briefly.
ON_A_CPU = {
    'output_dir="out", learning_rate=1e-3)': 'output_dir="out", learning_rate=1e-3, use_cpu=True, bf16=False, '
    "max_steps=2, report_to=[], disable_tqdm=True)",
    "learning_rate=1e-4, max_steps=100)": "max_steps=2, use_cpu=True, bf16=False, report_to=[], disable_tqdm=True)",
    "[4, 5, 6, 7]": "[1, 2]",
}


def blocks(document: str, language: str) -> list[str]:
    found = re.findall(rf"```{language}\n(.*?)```", (ROOT / document).read_text(), re.DOTALL)
    for old, new in ON_A_CPU.items():
        found = [block.replace(old, new) for block in found]
    return found


@pytest.fixture
def folder(tiny_model, sums, tmp_path, monkeypatch) -> Iterator[Path]:
    shutil.copytree(tiny_model, tmp_path / NAME)
    before = AutoModelForCausalLM.from_pretrained(tiny_model)
    torch.nn.init.normal_(before.model.layers[0].mlp.up_proj.weight)
    before.save_pretrained(tmp_path / "BASE")
    shutil.copy(sums, tmp_path / "train.jsonl")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_readme(folder) -> None:
    scope: dict[str, object] = {}
    for block in blocks("README.md", "python"):
        exec(block, scope)
    assert (folder / "my-mask" / "adapter_model.safetensors").exists()


def test_the_page_on_python(folder) -> None:
    with_trainer, with_dpo, own_loop, loading = blocks("docs/how-to/python.md", "python")
    exec(with_trainer, {})
    model = AutoModelForCausalLM.from_pretrained(NAME)
    pairs = Dataset.from_list([{"prompt": f"{a}+1=", "chosen": str(a + 1), "rejected": str(a)} for a in range(8)])
    dpo = {"DPOConfig": DPOConfig, "DPOTrainer": DPOTrainer, "MaskConfig": MaskConfig, "model": model, "pairs": pairs}
    dpo |= {"tokenizer": AutoTokenizer.from_pretrained(NAME), "MaskCallback": MaskCallback}
    exec(with_dpo.replace("...", "processing_class=tokenizer"), dpo)
    dpo["trainer"].train()
    ids = torch.randint(3, 60, (2, 9))
    loop = {"torch": torch, "get_peft_model": get_peft_model, "MaskConfig": MaskConfig, "find_group": find_group}
    exec(
        own_loop,
        loop
        | {"model": AutoModelForCausalLM.from_pretrained(NAME), "batches": 2 * [{"input_ids": ids, "labels": ids}]},
    )
    shutil.copytree("my-mask", "my-other-mask")
    exec(loading, {})


DOCUMENTS = ["README.md", *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "docs").rglob("*.md")))]


def flags_of(command: str, capsys: pytest.CaptureFixture[str]) -> set[str]:
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    return set(re.findall(r"--([\w-]+)", capsys.readouterr().out))


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_have_the_flags_that_a_document_gives_them(document, capsys) -> None:
    text = (ROOT / document).read_text().replace("\\\n", " ")
    commands = re.findall(r"maskft ([a-z]+)((?: [^`\n#]*)?)", text)
    for command, rest in commands:
        if command in cli.commands() and "--" in rest:
            assert set(re.findall(r"--([\w-]+)", rest)) <= flags_of(command, capsys), f"maskft {command}{rest}"


def test_settings_of_the_page_on_the_command_line_are_flags(capsys) -> None:
    rows = [line for line in (ROOT / "docs/reference/commands.md").read_text().split("\n") if line.startswith("| `--")]
    flags = {command: flags_of(command, capsys) for command in ("train", "crossfit", "restore")}
    for row in rows:
        named = set(re.findall(r"`--(\w+)", row.split("|")[1]))
        assert named
        (command,) = re.findall(r"\| of `(\w+)`", row) or ["train"]
        assert named <= flags[command], row


def test_the_config_file_of_the_page_is_read(folder, monkeypatch) -> None:
    (folder / "c.yaml").write_text(blocks("docs/reference/commands.md", "yaml")[0].replace("fft", NAME))
    taken = []
    monkeypatch.setattr(
        "maskft.training.run.run_train", lambda data, settings, mask, **_: taken.append((data, settings, mask))
    )
    assert cli.main(["train", "--config", "c.yaml"]) == 0
    ((data, settings, mask),) = taken
    assert (data.eval_dataset_name, settings.output_dir, settings.learning_rate) == ("validation.jsonl", "mask", 1e-3)
    assert mask.layers_to_transform == [1, 2]


# Words for indices, and for calibrated models, that the field does not know.
PRIVATE_WORDS = re.compile(r"\b(places|own temperatures?|(too|less) sure)\b")


def prose(text: str) -> Iterator[str]:
    """The sentences of a page; code, tables and pictures hold none."""
    text = re.sub(r"```.*?```|<!--.*?-->|!\[[^\]]*\]\([^)]*\)", "\n\n", text, flags=re.DOTALL)
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", re.sub(r"`[^`]*`", "`code`", text))
    lines = ["" if line.startswith(("|", "#")) else line for line in text.split("\n")]
    for block in re.split(r"\n\s*\n|\n(?=\s*(?:[-*]|\d+\.) )", "\n".join(lines)):
        yield from re.split(r"(?<=[.?!])\**\s+(?=[^a-z])", re.sub(r"^\s*(?:[-*]|\d+\.) ", "", " ".join(block.split())))


def words(text: str) -> list[str]:
    return [word for word in text.split() if re.search(r"\w", word)]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_sentences_are_short_of_known_words_and_one_number(document) -> None:
    for sentence in prose((ROOT / document).read_text()):
        assert len(words(sentence)) <= 25, sentence
        assert not PRIVATE_WORDS.search(sentence), sentence
        bare = re.sub(r"\[[^\]]*\]|\([^)]*\)|\bn = \d+|`code`", "", sentence)
        assert len(re.findall(r"(?<![\w.-])[-+]?\d[\d,.]*\b(?![\w-])", bare)) <= 1, sentence


def test_readme_and_site_are_short() -> None:
    assert len((ROOT / "README.md").read_text().split()) <= 600
    assert (
        sum(len(words(on_page_markdown((ROOT / document).read_text()))) for document in DOCUMENTS[1:]) <= 11_300
    )  # and the docstrings


def intervals(content: Any) -> Iterator[tuple[str, ...]]:
    """Each difference or score of a result with its interval, as a page would print them."""
    if isinstance(content, dict):
        found = next((content[key] for key in ("difference", "estimate", "score") if key in content), None)
        numbers = [found, content.get("low"), content.get("high")]
        if None not in numbers:
            for scale, digits in ((1, 4), (1, 3), (1, 1), (100, 1)):
                yield tuple(f"{scale * number:.{digits}f}" for number in numbers)
                yield tuple(f"{-scale * number:.{digits}f}" for number in (found, content["high"], content["low"]))
    for value in content.values() if isinstance(content, dict) else content if isinstance(content, list) else ():
        yield from intervals(value)


def test_differences_of_the_pages_stand_in_the_results() -> None:
    results = [json.loads(path.read_text()) for path in (ROOT / "studies").rglob("*.json")]
    known = {triple for result in results for triple in intervals(result)}
    number = r"([-+]?\d+\.\d+)"
    for document in DOCUMENTS:
        text = (ROOT / document).read_text()
        for quoted in re.finditer(rf"{number}(?: points| %)? \[{number}, {number}\]", text):
            assert tuple(part.replace("+", "") for part in quoted.groups()) in known, f"{document}: {quoted[0]}"
