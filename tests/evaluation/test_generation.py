import copy
from collections import Counter

import pytest
import torch
from peft import get_peft_model
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from maskft import MaskConfig
from maskft.evaluation.generation import generate_answers

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


def answers(model, tiny_model, num_tokens: int = 40, prompts=PROMPTS, **more) -> list[str]:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    return generate_answers(model, tokenizer, prompts, max_new_tokens=num_tokens, **more)[0]


def test_answers_are_those_of_generate_one_by_one_in_any_order(model, tiny_model) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    found, have_ended = generate_answers(model, tokenizer, PROMPTS, max_new_tokens=40, batch_size=3)
    assert set(have_ended) == {True, False}
    for prompt, answer, has_ended in zip(PROMPTS, found, have_ended, strict=True):
        encoded = tokenizer(prompt, return_tensors="pt")
        with torch.no_grad():
            output = model.generate(**encoded, max_new_tokens=40, do_sample=False)
        new = output[0, encoded["input_ids"].shape[1] :]
        assert answer == tokenizer.decode(new, skip_special_tokens=True)
        assert has_ended == bool(set(new.tolist()) & {1, 40, 41})
    assert len({len(answer) for answer in found}) > 2, "the answers must differ in length to say anything"
    assert answers(model, tiny_model, prompts=[]) == []
    order = [3, 1, 6, 0, 5, 2, 4]
    mixed = answers(model, tiny_model, prompts=[PROMPTS[i] for i in order], batch_size=2)
    assert mixed == [found[i] for i in order]


def test_answers_at_a_temperature_are_drawn_from_the_whole_distribution(model, tiny_model) -> None:
    def drawn(temperature: float) -> list[str]:
        torch.manual_seed(3)
        return answers(model, tiny_model, 1, prompts=["ab"] * 4000, batch_size=2000, temperature=temperature)

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    with torch.no_grad():
        likely = (model(**tokenizer("ab", return_tensors="pt")).logits[0, -1] / 2).softmax(0)
    found = Counter(drawn(2.0))
    assert found == Counter(drawn(2.0)), "the same seed draws the same"
    assert len(found) > 60, "more than the fifty likeliest, which Transformers' own default draws from"
    for text in map(tokenizer.decode, likely.topk(5).indices):
        share = sum(float(p) for i, p in enumerate(likely) if tokenizer.decode(i, skip_special_tokens=True) == text)
        assert found[text] / 4000 == pytest.approx(share, abs=4 * (share / 4000) ** 0.5)
    assert drawn(1e-4) == answers(model, tiny_model, 1, prompts=["ab"] * 4000)


@pytest.mark.parametrize("is_adapted", [False, True])
def test_what_a_model_configures_for_chats_is_left_out(is_adapted, model, tiny_model) -> None:
    configured = copy.deepcopy(model)
    configured = get_peft_model(configured, MaskConfig(density=1.0)) if is_adapted else configured
    changes = {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2, "min_new_tokens": 15, "num_beams": 2, "min_p": 0.5}
    configured.generation_config.update(**changes)
    configured.train()
    assert answers(configured, tiny_model, 20) == answers(model, tiny_model, 20)
    assert configured.generation_config.num_beams == 2, "it is what it was"
    assert configured.training


@pytest.mark.parametrize("configured", [40, [40, 41], None])
def test_an_answer_ends_at_the_tokenizers_end_token_too(configured, model, tiny_model, monkeypatch) -> None:
    """The end token is what training taught the model to write, whatever its generation config names."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    monkeypatch.setattr(model.generation_config, "eos_token_id", configured)
    written = [*tokenizer("7")["input_ids"], tokenizer.eos_token_id, *tokenizer("xxxx")["input_ids"]]
    left = list(written)

    def write(input_ids, scores):
        scores = torch.full_like(scores, -torch.inf)
        scores[:, left.pop(0)] = 0
        return scores

    generate = model.generate
    monkeypatch.setattr(model, "generate", lambda **given: generate(**given, logits_processor=[write]))
    assert answers(model, tiny_model, 6, ["3+4="]) == ["7"]
    assert left == written[2:]


def test_a_tokenizer_without_end_token_leaves_the_end_to_the_model(model, tiny_model) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.eos_token = None
    assert generate_answers(model, tokenizer, PROMPTS, max_new_tokens=40)[0] == answers(model, tiny_model)
