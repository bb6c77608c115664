"""Rows of each form, as files, and a tokenizer whose chat templates are given by name."""

import json

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

TEXT = {"prompt": "one plus one", "completion": "two"}
USER = {"role": "user", "content": "one plus one"}
ASSISTANT = {"role": "assistant", "content": "two"}
SYSTEM = {"role": "system", "content": "add"}
CONVERSATION = {"prompt": [USER], "completion": [ASSISTANT]}
MESSAGES = {"messages": [SYSTEM, USER, ASSISTANT]}
EXPANDED = {"prompt": [SYSTEM, USER], "completion": [ASSISTANT], "assistant_only_loss": True}
AGAIN, IS_TWO = USER | {"content": "again"}, ASSISTANT | {"content": "is two"}
CALL = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"one": 1}}}]}
TOOL = {"role": "tool", "name": "add", "content": "two"}
TOOLS = [{"type": "function", "function": {"name": "plus", "parameters": {"type": "object", "properties": {}}}}]

WORDS = ["<pad>", "<bos>", "<eos>", "<|im_start|>", "<|im_end|>", "<unk>", "system", "user", "assistant", "tool"]
WORDS += ["tools", "add", "one", "plus", "two", "three", "is", "again", "think", "so", "1"]
SAYS = (
    "{% if m.reasoning_content %}think {{ m.reasoning_content }} {% endif %}{{ m.content or '' }}"
    "{% for call in m.tool_calls or [] %}{% for key, value in call.function.arguments.items() %}"
    "{{ call.function.name }} {{ key }} {{ value }}{% endfor %}{% endfor %} <|im_end|>"
)
CHATML = (
    "{% if tools %}tools {% for tool in tools %}{{ tool.function.name }} {% endfor %}{% endif %}"
    "{% if loud %}again {% endif %}{% for m in messages %}<|im_start|> {{ m.role }} " + SAYS + " {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)
MARKED = "{% generation %}" + SAYS + "{% endgeneration %}"
TEMPLATES = {
    "chatml": CHATML,
    "marked": CHATML.replace(SAYS, f"{{% if m.role == 'assistant' %}}{MARKED}{{% else %}}{SAYS}{{% endif %}}"),
    "no end": CHATML.replace(" <|im_end|>", ""),
    "no tools": CHATML.replace("{% if tools %}", "{% if false %}"),
    "no calls": CHATML.replace("m.tool_calls or []", "[]"),
    "no reasoning": CHATML.replace("m.reasoning_content", "false"),
    "cutting": CHATML.replace("m.content or ''", "m.content.split('so')[-1]"),
    "no system": CHATML.replace("for m in messages", "for m in messages if m.role != 'system'"),
    "strict": "{% if messages[0].role == 'system' %}{{ raise_exception('No system turn') }}{% endif %}" + CHATML,
    "broken": "{{ messages.content.strip() }}" + CHATML,
}


def make_tokenizer(eos_token: str = "<|im_end|>", template: str | None = "chatml") -> PreTrainedTokenizerFast:
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    named = {"pad_token": "<pad>", "eos_token": eos_token, "unk_token": "<unk>"}
    special = ["<|im_start|>", "<|im_end|>", "<eos>"]
    chat_template = None if template is None else TEMPLATES.get(template, template)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, additional_special_tokens=special, chat_template=chat_template, **named
    )


def pair(*messages, **others) -> dict:
    """A row whose completion begins with the first answer."""
    first = next(i for i, message in enumerate(messages) if message["role"] == "assistant")
    return {"prompt": list(messages[:first]), "completion": list(messages[first:])} | others


def write_lines(path, *rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)
