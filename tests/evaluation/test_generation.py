import copy

import pytest
import torch
from peft import get_peft_model
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, LogitsProcessor

from maskft import MaskConfig
from maskft.errors import MaskftError
from maskft.evaluation import generation
from maskft.evaluation.generation import Decoding, generate_batches

PROMPTS = ["ab" * n for n in (1, 5, 2, 9, 4, 4, 7)]


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    """A random model that says many different things, and ends at any of a few tokens."""
    torch.manual_seed(6)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=98, initializer_range=0.3, max_position_embeddings=90, **shape))
    model.generation_config.eos_token_id = [1, 40, 41]
    model.generation_config.pad_token_id = 0
    return model.eval()


def answers(model, tokenizer, prompts, decoding, **more):
    found = {}
    for batch in generate_batches(model, tokenizer, prompts, decoding, **more):
        found |= dict(batch)
    return [found[i] for i in range(len(prompts))]


@pytest.mark.parametrize("round_length", [3, 1000])
def test_answers_are_those_of_generate_one_by_one(round_length, model, tiny_model, monkeypatch) -> None:
    monkeypatch.setattr(generation, "_ROUND", round_length)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    found = answers(model, tokenizer, PROMPTS, Decoding(max_new_tokens=40, batch_size=3))
    lengths = set()
    for prompt, answer in zip(PROMPTS, found, strict=True):
        encoded = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
        with torch.no_grad():
            output = model.generate(
                input_ids=encoded["input_ids"],
                attention_mask=encoded["attention_mask"],
                max_new_tokens=40,
                do_sample=False,
            )[0, encoded["input_ids"].shape[1] :]
        assert answer.text == tokenizer.decode(output, skip_special_tokens=True)
        assert answer.num_tokens == len(output)
        lengths.add(len(output))
    assert len(lengths) > 2, "the answers must differ in length to say anything"


@pytest.mark.parametrize("is_adapted", [False, True])
def test_what_a_model_configures_for_chats_is_no_part_of_a_protocol(is_adapted, model, tiny_model) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    decodings = [Decoding(max_new_tokens=20, batch_size=7), Decoding(max_new_tokens=20, batch_size=7, temperature=1.0)]
    configured = copy.deepcopy(model)
    if is_adapted:
        configured = get_peft_model(configured, MaskConfig(density=1.0)).eval()
    changes = {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2, "min_new_tokens": 15, "num_beams": 2, "min_p": 0.5}
    configured.generation_config.update(**changes)
    for decoding in decodings:
        expected = answers(model, tokenizer, PROMPTS, decoding)
        assert answers(configured, tokenizer, PROMPTS, decoding) == expected
    assert configured.generation_config.num_beams == 2, "it is what it was"


@pytest.mark.parametrize("round_length", [3, 1000])
def test_a_stop_text_ends_an_answer_but_not_from_within_the_prompt(
    round_length, model, tiny_model, monkeypatch
) -> None:
    monkeypatch.setattr(generation, "_ROUND", round_length)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    full = answers(model, tokenizer, PROMPTS, Decoding(max_new_tokens=40, batch_size=7))
    stop = next(a.text[2:4] for a in full if len(a.text) > 8)
    cut = answers(model, tokenizer, PROMPTS, Decoding(max_new_tokens=40, batch_size=7, stop=(stop,)))
    assert [a.text for a in cut] == [a.text.split(stop)[0] for a in full]
    assert sum(a.num_tokens for a in cut) < sum(a.num_tokens for a in full)
    for whole, part in zip(full, cut, strict=True):
        if stop in whole.text:
            assert part.num_tokens == whole.text.index(stop) + len(stop)
    # The prompt's end and the answer's beginning make no stop text together.
    joined = PROMPTS[3][-1] + full[3].text[0]
    assert answers(model, tokenizer, PROMPTS, Decoding(40, (joined,), 7))[3].text == full[3].text.split(joined)[0]


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_order_and_left_out_batches_change_nothing(temperature, model, tiny_model) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    decoding = Decoding(max_new_tokens=20, batch_size=2, temperature=temperature, seed=5)
    first = answers(model, tokenizer, PROMPTS, decoding, ids=list("abcdefg"))
    order = [3, 1, 6, 0, 5, 2, 4]
    mixed = answers(model, tokenizer, [PROMPTS[i] for i in order], decoding, ids=["abcdefg"[i] for i in order])
    assert mixed == [first[i] for i in order]
    rest = {}
    for batch in generate_batches(model, tokenizer, PROMPTS, decoding, ids=list("abcdefg"), done=lambda p: 3 in p):
        rest |= dict(batch)
    assert 0 < len(rest) < 7
    assert all(first[i] == answer for i, answer in rest.items())
    if temperature:
        other = Decoding(max_new_tokens=20, batch_size=2, temperature=temperature, seed=6)
        assert answers(model, tokenizer, PROMPTS, other, ids=list("abcdefg")) != first


@pytest.mark.parametrize("configured", [40, [40, 41], None])
def test_an_answer_ends_at_the_tokenizers_end_token_too(configured, model, tiny_model, monkeypatch) -> None:
    """The end token is what training taught the model to write, whatever its generation config names."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    monkeypatch.setattr(model.generation_config, "eos_token_id", configured)
    written = [*tokenizer("7")["input_ids"], tokenizer.eos_token_id, *tokenizer("xxxx")["input_ids"]]

    class Writes(LogitsProcessor):
        def __init__(self) -> None:
            self.num_written = 0

        def __call__(self, input_ids, scores):
            scores = torch.full_like(scores, -torch.inf)
            scores[:, written[self.num_written]] = 0
            self.num_written += 1
            return scores

    generate = model.generate
    processor = Writes()
    monkeypatch.setattr(model, "generate", lambda **given: generate(**given, logits_processor=[processor]))
    (answer,) = answers(model, tokenizer, ["3+4="], Decoding(max_new_tokens=6))
    assert (answer.text, answer.num_tokens, processor.num_written) == ("7", 2, 2)


def test_a_tokenizer_without_end_token_leaves_the_end_to_the_model(model, tiny_model) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    with_end = answers(model, tokenizer, PROMPTS, Decoding(max_new_tokens=40))
    tokenizer.eos_token = None
    assert answers(model, tokenizer, PROMPTS, Decoding(max_new_tokens=40)) == with_end


def test_a_prompt_without_room_loses_its_beginning(model, tiny_model) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    decoding = Decoding(max_new_tokens=30, batch_size=2)
    long, kept = answers(model, tokenizer, ["x" * 50 + "ab" * 30, "ab" * 30], decoding)
    assert (long.text, long.is_prompt_cut, kept.is_prompt_cut) == (kept.text, True, False)
    with pytest.raises(MaskftError, match="`max_new_tokens` is 90, but the model's context has 90 tokens"):
        answers(model, tokenizer, PROMPTS, Decoding(max_new_tokens=90))
