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
    general = tmp_path / "general.jsonl"
    general.write_text("".join(json.dumps({"prompt": f"{i}-1="}) + "\n" for i in range(8)))
    retain = ["--retain_dataset_name", str(general)]
    more = {"crossfit": ["--per_device_train_batch_size", "4", *retain]}
    more["restore"] = ["--reference_model_name_or_path", str(tiny_model), *retain]
    for command in ("sft", "train", "crossfit", "restore", "search"):
        assert main([command, *given, *more.get(command, []), "--output_dir", str(tmp_path / "out")]) == 0
        out = capsys.readouterr().out
        assert f"{first['prompt']}⟦{first['completion']}<eos>⟧" in out
        assert "57" in out
    assert not (tmp_path / "out").exists()
    general.write_text('{"promt": "1-1="}\n')
    for command in ("crossfit", "restore"):
        assert main([command, *given, *more[command], "--output_dir", str(tmp_path / "out")]) == 2
        assert "general.jsonl, line 1: a row with the keys 'promt' has none" in capsys.readouterr().err
    assert main(["sft", *given, "--eos_token", "<unk>", "--max_length", "7"]) == 2
    assert "rows trains an end token (ids [1, 2]): all of them are cut at max_length=7" in capsys.readouterr().err
