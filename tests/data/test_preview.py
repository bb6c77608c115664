import json

from example_rows import CONVERSATION, TEXT, make_tokenizer, write_lines

from maskft.cli import main
from maskft.data.preview import coloured
from maskft.data.rows import Reader, load_rows
from maskft.data.tokens import RowTokeniser


def test_what_is_trained_is_in_colour_and_brackets(tmp_path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", CONVERSATION, TEXT)
    tokenizer = make_tokenizer()
    shown = [coloured(row, tokenizer) for row in load_rows(path, reader=Reader(RowTokeniser(tokenizer)))]
    start = "<|im_start|> user one plus one <|im_end|> <|im_start|> assistant"
    assert [text.plain for text in shown] == [f"{start}⟦two <|im_end|>⟧", "one plus⟦<unk> <|im_end|>⟧"]
    assert [[span.style for span in text.spans] for text in shown] == [["bold green"], ["bold green"]]


def test_a_dry_run_reads_no_weights_and_writes_nothing(tiny_model, sums, tmp_path, monkeypatch, capsys) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", refuse)
    given = ["--model_name_or_path", str(tiny_model), "--dataset_name", str(sums), "--dry_run", "True"]
    for command in ("sft", "train", "crossfit"):
        assert main([command, *given, "--output_dir", str(tmp_path / "out")]) == 0
        first = json.loads(sums.read_text().splitlines()[0])
        out = capsys.readouterr().out
        assert f"{first['prompt']}⟦{first['completion']}<eos>⟧" in out
        assert "57" in out
    assert not (tmp_path / "out").exists()
