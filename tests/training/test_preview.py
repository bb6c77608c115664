"""What `--dry_run` shows."""

import json

from transformers import AutoTokenizer

from maskft.cli import main
from maskft.training.preview import coloured


def test_what_is_trained_is_in_colour_and_brackets(tiny_model) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    ids = tokenizer("1+1=2?3")["input_ids"]
    text = coloured({"input_ids": ids, "labels": [-100] * 4 + [ids[4], -100, ids[6]]}, tokenizer)
    assert text.plain == "1+1=⟦2⟧?⟦3⟧"
    assert [text.plain[span.start : span.end] for span in text.spans] == ["⟦2⟧", "⟦3⟧"]


def test_a_dry_run_reads_no_weights_and_writes_nothing(tiny_model, sums, tmp_path, monkeypatch, capsys) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", refuse)
    given = ["--model_name_or_path", str(tiny_model), "--dataset_name", str(sums), "--dry_run", "True"]
    first = json.loads(sums.read_text().splitlines()[0])
    for command in ("sft", "train", "crossfit", "search"):
        assert main([command, *given, "--output_dir", str(tmp_path / "out")]) == 0
        out = capsys.readouterr().out
        assert f"{first['prompt']}⟦{first['completion']}<eos>⟧" in out
        assert "57" in out
    assert not (tmp_path / "out").exists()
    assert main(["sft", *given, "--eos_token", "<unk>", "--max_length", "7"]) == 2
    assert "rows trains an end token (ids [1, 2]): all of them are cut at max_length=7" in capsys.readouterr().err
