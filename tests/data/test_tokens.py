import logging

import pytest
from datasets import Dataset
from example_rows import ASSISTANT, CONVERSATION, EXPANDED, SYSTEM, TEXT, USER, write_lines
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from maskft.data.rows import load_rows
from maskft.data.tokens import check_end_token_trained, end_token_ids, tokenise_row, tokenise_rows
from maskft.errors import MaskftError

WORDS = ["<pad>", "<bos>", "<eos>", "<|im_start|>", "<|im_end|>", "<unk>", "system", "user", "assistant"]
WORDS += ["add", "one", "plus", "two", "three", "is", "again"]
CHATML = (
    "{% for message in messages %}<|im_start|> {{ message['role'] }} {{ message['content'] }} <|im_end|> "
    "{% endfor %}{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)
WITHOUT_END = CHATML.replace(" <|im_end|>", "")


def make_tokenizer(eos_token: str, chat_template: str = CHATML) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    named = {"pad_token": "<pad>", "eos_token": eos_token, "unk_token": "<unk>", "chat_template": chat_template}
    special = ["<|im_start|>", "<|im_end|>", "<eos>"]
    return PreTrainedTokenizerFast(tokenizer_object=core, additional_special_tokens=special, **named)


@pytest.fixture
def process(tmp_path):
    """What TRL's trainer makes of rows."""

    def build(rows: Dataset, tokenizer: PreTrainedTokenizerFast, max_length: int | None = 64) -> Dataset:
        size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
        tokens = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=len(WORDS), **size, **tokens))
        off = {"activation_checkpointing": False, "bf16": False, "report_to": "none"}
        settings = SFTConfig(output_dir=str(tmp_path), max_length=max_length, use_cpu=True, **off)
        return SFTTrainer(model, settings, train_dataset=rows, processing_class=tokenizer).train_dataset

    return build


def trained_text(dataset: Dataset, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    return [tokenizer.decode([token for token in row if token != -100]) for row in dataset["labels"]]


def context_text(dataset: Dataset, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    return [
        tokenizer.decode([token for token, label in zip(*pair, strict=True) if label == -100])
        for pair in zip(dataset["input_ids"], dataset["labels"], strict=True)
    ]


@pytest.mark.parametrize(
    ("row", "max_length"),
    [(TEXT, None), (TEXT, 4), (TEXT | {"completion": "two <eos>"}, None), (CONVERSATION, None), (CONVERSATION, 9)],
)
def test_rows_are_tokenised_as_trl_does(row, max_length, process) -> None:
    rows, tokenizer = Dataset.from_list([row, row]), make_tokenizer("<eos>")
    ours, theirs = tokenise_rows(rows, tokenizer, max_length=max_length), process(rows, tokenizer, max_length)
    for column in ("input_ids", "labels"):
        assert list(ours[column]) == [list(value)[:max_length] for value in theirs[column]]
    whole = tokenise_row(row, tokenizer)
    assert {column: ours[0][column] for column in whole} == {key: ids[:max_length] for key, ids in whole.items()}
    assert max_length is not None or whole["labels"][-1] == tokenizer.eos_token_id or row is CONVERSATION


def test_only_the_assistant_and_its_end_are_trained(tmp_path, process, caplog) -> None:
    turns = [SYSTEM, USER, ASSISTANT, {"role": "user", "content": "again"}, ASSISTANT | {"content": "is two"}]
    rows = load_rows(write_lines(tmp_path / "rows.jsonl", {"messages": turns}))
    tokenizer = make_tokenizer("<|im_end|>")
    processed = process(rows, tokenizer)
    assert trained_text(processed, tokenizer) == ["two <|im_end|>", "is two <|im_end|>"]
    start = "<|im_start|> system add <|im_end|> <|im_start|> user one plus one <|im_end|> <|im_start|> assistant"
    assert context_text(processed, tokenizer) == [
        start,
        f"{start} two <|im_end|> <|im_start|> user again <|im_end|> <|im_start|> assistant",
    ]
    check_end_token_trained(processed, end_token_ids(tokenizer, None), max_length=64)
    assert caplog.text == ""


@pytest.mark.parametrize("template", [CHATML, WITHOUT_END])
def test_template_that_never_trains_the_end_is_refused(process, template, caplog) -> None:
    # With CHATML the turn is closed, but by another token than the one at which generation stops.
    tokenizer = make_tokenizer("<eos>", template)
    processed = process(Dataset.from_list([EXPANDED]), tokenizer)
    with pytest.raises(MaskftError, match=r"None of the 1 rows with a loss .*\(ids \[2\]\).* chat template"):
        check_end_token_trained(processed, end_token_ids(tokenizer, None), max_length=64)
    if template == CHATML:  # unless the generation config names it
        ends = end_token_ids(tokenizer, GenerationConfig(eos_token_id=[4]))
        check_end_token_trained(processed, ends, max_length=64)
        assert caplog.text == ""


def test_rows_cut_by_max_length(process, caplog) -> None:
    # Tokens with the prompt's 4: 6 (whole), 9 (cut), and a prompt that fills max_length (dropped by TRL).
    tokenizer = make_tokenizer("<eos>")
    prompts = ["one plus one is ", "one plus one is ", "one plus one plus one plus one is "]
    loaded = Dataset.from_dict({"prompt": prompts, "completion": ["two ", "two plus two is ", "three "]})
    ends = end_token_ids(tokenizer, None)
    whole = process(loaded.select([0]), tokenizer)
    assert (trained_text(whole, tokenizer), context_text(whole, tokenizer)) == (["two <eos>"], ["one plus one is"])
    check_end_token_trained(whole, ends, max_length=64)
    assert caplog.text == ""
    processed = process(loaded, tokenizer, 7)
    with caplog.at_level(logging.WARNING, logger="maskft.data.tokens"):
        check_end_token_trained(processed, ends, max_length=7, num_rows=len(loaded))
    assert "1 of 3 training rows (33.3 %) do not train the end token, 1 of them because they are" in caplog.text
    assert "1 of 3 training rows (33.3 %) have no token to train on" in caplog.text

    every = process(loaded.select([1, 1]), tokenizer, 7)
    with pytest.raises(MaskftError, match=r"all of them are cut at max_length=7; raise max_length"):
        check_end_token_trained(every, ends, max_length=7)
    none_left = processed.select([])
    with pytest.raises(MaskftError, match=r"None of the 3 rows has a token to train on: .*max_length=7"):
        check_end_token_trained(none_left, ends, max_length=7, num_rows=3)


def test_whole_rows_give_no_warning(caplog) -> None:
    processed = Dataset.from_dict({"input_ids": [[5, 2], [6, 6, 2]], "labels": [[-100, 2], [-100, 6, 2]]})
    check_end_token_trained(processed, {2}, max_length=2)
    assert caplog.text == ""


def test_end_tokens_are_collected() -> None:
    tokenizer = make_tokenizer("<eos>")
    assert end_token_ids(tokenizer, None) == {2}
    for configured, expected in ((None, {2}), (4, {2, 4}), ([2, 4], {2, 4})):
        assert end_token_ids(tokenizer, GenerationConfig(eos_token_id=configured)) == expected
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    with pytest.raises(MaskftError, match=r"no end token, .* set eos_token"):
        end_token_ids(tokenizer, GenerationConfig(eos_token_id=4))
