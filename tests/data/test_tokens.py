"""What is trained, as decoded labels; against TRL's own preparation of the same rows."""

import copy
import json
import logging
from pathlib import Path

import pytest
import trl
from datasets import Dataset, load_dataset
from example_rows import (
    AGAIN,
    ASSISTANT,
    CALL,
    CONVERSATION,
    EXPANDED,
    IS_TWO,
    MESSAGES,
    SYSTEM,
    TEXT,
    TOOL,
    TOOLS,
    USER,
    WORDS,
    make_tokenizer,
    write_lines,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer, maybe_convert_to_chatml

from maskft.adapters.model_files import Limits
from maskft.data.rows import Reader, load_rows, tokenise_rows
from maskft.data.tokens import RowTokeniser, end_token_ids
from maskft.errors import MaskftError
from maskft.training.trainer import check_end_token_trained

THINKING = ASSISTANT | {"reasoning_content": "so one"}
LONG = {"messages": [SYSTEM, USER, ASSISTANT, AGAIN, IS_TWO]}
LOUD = {"chat_template_kwargs": {"loud": True}}
CALLS = {"messages": [USER, CALL, TOOL, ASSISTANT], "tools": TOOLS}
SHAREGPT = {"conversations": [{"from": "user", "value": "one plus one"}, {"from": "assistant", "value": "two"}]}

# Turns, with what is trained on in brackets; < and > begin and end a turn.
ADD, ONE, TWO = "< system add >", "< user one plus one >", "< assistant [ two > ]"
IS = "< assistant [ is two > ]"


def trained(row, tokenizer, **options) -> list[str]:
    """The text of each part of a row as a user writes it: trained tokens in brackets."""
    path = write_lines(Path(options.pop("folder")) / "row.jsonl", row)
    rows = load_rows(path, reader=Reader(RowTokeniser(tokenizer, **options)))
    parts = []
    for part in rows:
        words, is_trained = [], False
        for token, label in [*zip(part["input_ids"], part["labels"], strict=True), (None, -100)]:
            if (label != -100) != is_trained:
                words, is_trained = [*words, "]" if is_trained else "["], not is_trained
            words += [] if token is None else [tokenizer.convert_ids_to_tokens(token)]
        parts.append(" ".join(words).replace("<|im_start|>", "<").replace("<|im_end|>", ">"))
    return parts


@pytest.mark.parametrize(
    ("row", "template", "expected"),
    [
        ({"prompt": "one plus ", "completion": "two"}, None, ["one plus [ two > ]"]),
        ({"text": "one plus two"}, None, ["[ one plus two > ]"]),
        (CONVERSATION, "chatml", [f"{ONE} {TWO}"]),
        (MESSAGES, "chatml", [f"{ADD} {ONE} {TWO}"]),
        (LONG, "marked", [f"{ADD} {ONE} {TWO} < user again > {IS}"]),
        (LONG, "chatml", [f"{ADD} {ONE} {TWO}", f"{ADD} {ONE} < assistant two > < user again > {IS}"]),
        (
            {"prompt": [USER, ASSISTANT, AGAIN], "completion": [IS_TWO, AGAIN, ASSISTANT]},
            "marked",
            [f"{ONE} < assistant two > < user again > {IS} < user again > {TWO}"],
        ),
        (CALLS, "marked", [f"tools plus {ONE} < assistant [ add one 1 > ] < tool two > {TWO}"]),
        (
            CALLS,
            "chatml",
            [
                f"tools plus {ONE} < assistant [ add one 1 > ]",
                f"tools plus {ONE} < assistant add one 1 > < tool two > {TWO}",
            ],
        ),
        ({"messages": [USER, THINKING]}, "chatml", [f"{ONE} < assistant [ think so one two > ]"]),
        (CONVERSATION | {"system": "add"} | LOUD, "chatml", [f"again {ADD} {ONE} {TWO}"]),
        (SHAREGPT, "marked", [f"{ONE} {TWO}"]),
        ({"instruction": "add", "input": "one", "output": "two"}, "chatml", [f"< user add one > {TWO}"]),
    ],
)  # fmt: skip
def test_what_each_form_trains(row, template, expected, tmp_path) -> None:
    assert trained(row, make_tokenizer(template=template), folder=tmp_path) == expected


@pytest.mark.parametrize(
    ("row", "template", "told"),
    [
        (MESSAGES, "strict", r"line 1: the chat template cannot render the messages \(TemplateError: No system turn\)"),
        (MESSAGES, "broken", "cannot render the messages .UndefinedError"),
        (MESSAGES, "{% for %}", "cannot render the messages .TemplateSyntaxError"),
        (MESSAGES, None, "messages need a chat template, .* --chat_template_path"),
        (MESSAGES, "no system", "leaves out 'add', which the system says"),
        ({"messages": [USER, ASSISTANT | {"content": "is so two"}]}, "cutting", "leaves out 'is so two', which the"),
        ({"messages": [USER, THINKING]}, "no reasoning", "leaves out 'so one', which the assistant says"),
        (CALLS, "no calls", "leaves out 'add', which the assistant says"),
        (CALLS, "no tools", "does not show the row's tools"),
    ],
)  # fmt: skip
def test_a_template_that_does_not_say_it_all_is_refused(row, template, told, tmp_path) -> None:
    with pytest.raises(MaskftError, match=told) as caught:
        trained(row, make_tokenizer(template=template), folder=tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("limits", "told"),
    [
        (Limits(len(WORDS), 6), "it has 10 tokens, and the model has 6 positions; set --max_length to that"),
        (
            Limits(WORDS.index("two"), None),
            f"the token 'two' has the id {WORDS.index('two')}, .* {WORDS.index('two')} tokens",
        ),
    ],
)
def test_tokens_beyond_the_model_are_refused(limits, told, tmp_path) -> None:
    with pytest.raises(MaskftError, match=told):
        trained(CONVERSATION, make_tokenizer(), folder=tmp_path, limits=limits)
    trained(CONVERSATION, make_tokenizer(), folder=tmp_path, limits=Limits(len(WORDS), 10))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"max_length": 4}, "one plus [ two two ]"),
        ({"max_length": 4, "truncation_mode": "keep_end"}, "[ two two two > ]"),
        ({"completion_only_loss": False}, "[ one plus two two two > ]"),
    ],
)
def test_rows_are_cut_and_labelled_as_the_settings_say(options, expected, tmp_path) -> None:
    row = {"prompt": "one plus ", "completion": "two two two"}
    assert trained(row, make_tokenizer(), folder=tmp_path, **options) == [expected]


def test_the_loss_of_assistants_alone_needs_marks(tmp_path) -> None:
    only = {"assistant_only_loss": True, "folder": tmp_path}
    assert trained(CONVERSATION, make_tokenizer(template="marked"), **only) == [f"{ONE} {TWO}"]
    for row, told in (
        (CONVERSATION, "needs a chat template with"),
        (TEXT, "is for messages, and the row is"),
    ):
        with pytest.raises(MaskftError, match=told):
            trained(row, make_tokenizer(), **only)


def chat_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with one of TRL's templates."""
    words = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    core = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<|im_start|>", "<|im_end|>"]
    named = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "bos_token": "<|endoftext|>"}
    made = PreTrainedTokenizerFast(tokenizer_object=core, additional_special_tokens=special, **named)
    made.chat_template = (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")
    return made


def trl_rows(path: str, tokenizer, **settings) -> Dataset:
    """What TRL's trainer makes of a file."""
    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    tokens = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **size, **tokens))
    off = {"activation_checkpointing": False, "bf16": False, "report_to": "none", "use_cpu": True}
    config = SFTConfig(output_dir=str(Path(path).parent / "trl"), **off, **settings)
    rows = load_dataset("json", data_files=path, split="train", cache_dir=str(Path(path).parent / "cache"))
    if "conversations" in rows.column_names:  # which TRL does not do before it looks for messages
        rows = rows.map(maybe_convert_to_chatml, remove_columns="conversations")
    return SFTTrainer(model, config, train_dataset=rows, processing_class=copy.deepcopy(tokenizer)).train_dataset


WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Of a place.",
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
    },
}
ASKED = {"type": "function", "function": {"name": "weather", "arguments": {"place": "Rome"}}}
TOOL_TURNS = [USER, {"role": "assistant", "content": "", "tool_calls": [ASKED]}, TOOL | {"name": "weather"}, IS_TWO]
ONLY = {"assistant_only_loss": True}


@pytest.mark.parametrize(
    ("row", "template", "settings"),
    [
        (TEXT, "qwen3", {}),
        (TEXT, "qwen3", {"max_length": 14}),
        (TEXT, "qwen3", {"max_length": 14, "truncation_mode": "keep_end"}),
        (TEXT, "qwen3", {"completion_only_loss": False}),
        (TEXT | {"completion": "two<|im_end|>"}, "qwen3", {}),
        ({"text": "one plus one"}, "qwen3", {}),
        ({"body": "one plus one"}, "qwen3", {"dataset_text_field": "body"}),
        *[(CONVERSATION, template, {}) for template in ("qwen2_5", "qwen3", "gemma", "llama3", "phi3", "lfm2")],
        (CONVERSATION, "qwen3", {"max_length": 60}),
        (CONVERSATION | {"chat_template_kwargs": {"enable_thinking": False}}, "qwen3", {}),
        (CONVERSATION | {"tools": [WEATHER]}, "qwen2_5", {}),
        (CONVERSATION | {"tools": json.dumps([WEATHER])}, "qwen2_5", {}),
        *[(MESSAGES, template, ONLY) for template in ("qwen2_5", "qwen3", "llama3", "phi3")],
        *[(LONG, template, ONLY) for template in ("qwen2_5", "qwen3", "llama3", "glm4moe")],
        ({"messages": TOOL_TURNS, "tools": [WEATHER]}, "qwen2_5", ONLY),
        ({"messages": TOOL_TURNS, "tools": [WEATHER]}, "qwen3", ONLY),
        ({"messages": [USER, THINKING, AGAIN, THINKING]}, "qwen3", ONLY),
        (SHAREGPT, "qwen2_5", ONLY),
        ({"prompt": [USER, ASSISTANT, AGAIN], "completion": [IS_TWO, AGAIN, ASSISTANT]}, "qwen2_5", ONLY),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*truncation mode is deprecated:FutureWarning")
def test_tokens_and_labels_are_those_of_trl(row, template, settings, tmp_path) -> None:
    path, tokenizer = write_lines(tmp_path / "rows.jsonl", row, row), chat_tokenizer(template)
    theirs = trl_rows(path, tokenizer, **settings)
    text_field = settings.get("dataset_text_field", "text")
    given = {name: value for name, value in settings.items() if name != "dataset_text_field"}
    reader = Reader(
        RowTokeniser(tokenizer, **({"max_length": 1024} | given)), {} if text_field == "text" else {"text": text_field}
    )
    ours = load_rows(path, reader=reader)
    assert [list(ids) for ids in ours["input_ids"]] == [list(ids) for ids in theirs["input_ids"]]
    assert [list(labels) for labels in ours["labels"]] == [list(labels) for labels in theirs["labels"]]
    without = RowTokeniser(tokenizer, **({"max_length": 1024, **given, "assistant_only_loss": False}))
    if row in (LONG, MESSAGES):  # which need no flag for it
        assert load_rows(path, reader=Reader(without)).to_list() == ours.to_list()


def test_what_a_conversation_trains_without_marks_is_that_of_its_turns_in_trl(tmp_path) -> None:
    tokenizer = make_tokenizer()
    turns = [
        {"prompt": [SYSTEM, USER], "completion": [ASSISTANT]},
        {"prompt": LONG["messages"][:4], "completion": [IS_TWO]},
    ]
    theirs = trl_rows(write_lines(tmp_path / "turns.jsonl", *turns), tokenizer)
    ours = load_rows(write_lines(tmp_path / "rows.jsonl", LONG), reader=Reader(RowTokeniser(tokenizer, 1024)))
    assert ours["labels"][:] == theirs["labels"][:]
    assert ours["input_ids"][:] == theirs["input_ids"][:]


def tokens_of(tokenizer, *rows, max_length=None) -> Dataset:
    return tokenise_rows(Dataset.from_list(list(rows)), RowTokeniser(tokenizer, max_length))


@pytest.mark.parametrize("template", ["chatml", "no end"])
def test_template_that_never_trains_the_end_is_refused(template, caplog) -> None:
    # With ChatML the turn is closed, but by another token than the one at which generation stops.
    tokenizer = make_tokenizer("<eos>", template)
    rows = tokens_of(tokenizer, EXPANDED)
    with pytest.raises(MaskftError, match=r"None of the 1 rows trains an end token \(ids \[2\]\).* chat template"):
        check_end_token_trained(rows, end_token_ids(tokenizer, None), max_length=64)
    if template == "chatml":  # unless the generation config names it
        check_end_token_trained(rows, end_token_ids(tokenizer, GenerationConfig(eos_token_id=[4])), max_length=64)
        assert caplog.text == ""


def test_rows_cut_by_max_length_do_not_train_the_end(caplog) -> None:
    tokenizer = make_tokenizer("<eos>")
    whole, cut = ({"prompt": "one plus one is ", "completion": text} for text in ("two ", "two plus two is "))
    ends = end_token_ids(tokenizer, None)
    check_end_token_trained(tokens_of(tokenizer, whole), ends, max_length=64)
    check_end_token_trained(tokens_of(tokenizer, whole, max_length=6), ends, max_length=6)
    assert caplog.text == ""
    with caplog.at_level(logging.WARNING, logger="maskft.training.trainer"):
        check_end_token_trained(tokens_of(tokenizer, whole, cut, max_length=7), ends, max_length=7)
    assert "1 of 2 training rows (50.0 %) do not train the end token, 1 since max_length=7 cuts them" in caplog.text
    with pytest.raises(MaskftError, match=r"all of them are cut at max_length=7; raise max_length"):
        check_end_token_trained(tokens_of(tokenizer, cut, cut, max_length=7), ends, max_length=7)


def test_end_tokens_are_collected() -> None:
    tokenizer = make_tokenizer("<eos>")
    assert end_token_ids(tokenizer, None) == {2}
    for configured, expected in ((None, {2}), (4, {2, 4}), ([2, 4], {2, 4})):
        assert end_token_ids(tokenizer, GenerationConfig(eos_token_id=configured)) == expected
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    with pytest.raises(MaskftError, match=r"no end token, .* set eos_token"):
        end_token_ids(tokenizer, GenerationConfig(eos_token_id=4))


def test_an_answer_whose_writer_was_stopped_is_not_trained_to_end_there() -> None:
    tokenise = RowTokeniser(make_tokenizer())
    chat = {"prompt": [USER], "completion": [ASSISTANT]}
    for row in (chat, chat | {"prompt": [SYSTEM, USER, ASSISTANT, AGAIN]}, {"prompt": "one", "completion": " two"}):
        (whole,), (part,) = tokenise(row), tokenise(row | {"is_unfinished": True})
        assert part["input_ids"] == whole["input_ids"]
        lost = [i for i, pair in enumerate(zip(whole["labels"], part["labels"], strict=True)) if pair[0] != pair[1]]
        assert [whole["labels"][i] for i in lost] == [tokenise.tokenizer.eos_token_id]
        assert sum(label != -100 for label in part["labels"]) > 0
