"""What a model said before its fine-tuning: against whole distributions computed in plain float64."""

import json
import logging
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from maskft.data.tokens import RowTokeniser
from maskft.training.retain import answer_rows, batches_of, coarse_log_probs, read_general_rows, retained_loss, teach
from maskft.training.wise_ft import scaled_changes

ROWS = Dataset.from_list(
    [
        {"input_ids": [5, 6, 7, 8, 9], "labels": [-100, -100, 7, 8, 9]},
        {"input_ids": [9, 8, 7], "labels": [-100, -100, 7]},
        {"input_ids": [3, 4, 5, 6], "labels": [-100, 4, 5, 6]},
    ]
)


def models(folder: Path) -> list[torch.nn.Module]:
    """A model, and one that is near it."""
    pair = [AutoModelForCausalLM.from_pretrained(folder) for _ in range(2)]
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in pair[1].parameters():
            weight += 0.02 * torch.randn_like(weight)
    return pair


def plain_divergence(before: torch.nn.Module, now: torch.nn.Module) -> float:
    """KL(before || now) over the trained tokens, row by row and over the whole vocabulary."""
    total, count = 0.0, 0
    for row in ROWS:
        ids = torch.tensor([row["input_ids"]])
        log_p, log_q = (model(ids).logits[0].double().log_softmax(-1) for model in (before, now))
        for place, label in enumerate(row["labels"][1:]):
            if label != -100:
                total += (log_p[place].exp() * (log_p[place] - log_q[place])).sum().item()
                count += 1
    return total / count


@torch.no_grad()
def test_the_loss_is_the_divergence_of_whole_distributions(tiny_model: Path) -> None:
    before, now = models(tiny_model)
    taught = teach(before, ROWS, batch_size=2)
    assert [len(row.likeliest) for row in taught] == [3, 1, 3]
    assert retained_loss(now, taught).item() == pytest.approx(plain_divergence(before, now), rel=1e-4)
    assert retained_loss(before, taught).item() == pytest.approx(0, abs=1e-6)


@torch.no_grad()
def test_a_part_of_the_vocabulary_bounds_it_from_below(tiny_model: Path) -> None:
    before, now = models(tiny_model)
    losses = [retained_loss(now, teach(before, ROWS, batch_size=3, num_likeliest=k)).item() for k in (2, 5)]
    assert 0 < losses[0] <= losses[1] <= plain_divergence(before, now) + 1e-6
    assert teach(before, ROWS, batch_size=3, num_likeliest=2)[0].log_probs.shape == (3, 3)


@given(st.integers(0, 10**6), st.integers(1, 11), st.floats(0.1, 200))
def test_coarse_probabilities_sum_to_one_and_are_never_infinite(seed: int, k: int, scale: float) -> None:
    logits = scale * torch.randn(4, 11, generator=torch.Generator().manual_seed(seed))
    coarse = coarse_log_probs(logits, logits.topk(k).indices)
    assert coarse.isfinite().all()
    assert coarse.shape == (4, k + (k < 11))
    torch.testing.assert_close(coarse.exp().sum(-1), torch.ones(4))
    expected = F.softmax(logits.double(), -1).sort(descending=True).values
    torch.testing.assert_close(coarse[:, :k].exp().double(), expected[:, :k], atol=1e-5, rtol=1e-4)


def test_the_gradient_goes_to_the_model_that_learns(tiny_model: Path) -> None:
    before, now = models(tiny_model)
    retained_loss(now, teach(before, ROWS, batch_size=2)).backward()
    assert all(weight.grad is None for weight in before.parameters())
    assert any(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in now.parameters())


def test_batches_go_round_and_each_is_known_by_its_number(tiny_model: Path) -> None:
    taught = teach(models(tiny_model)[0], ROWS, batch_size=2)
    batch = batches_of(taught, 2, seed=1)
    drawn = [row.row["input_ids"] for n in range(3) for row in batch(n)]
    assert sorted(drawn) == sorted(list(ROWS["input_ids"]) * 2)
    assert batches_of(taught, 2, seed=1)(2) == batch(2)
    assert [len(batches_of(taught, 8, seed=1)(0))] == [8]


@torch.no_grad()
def test_scaled_changes_are_lines_and_leave_nothing(tiny_model: Path) -> None:
    before, tuned = models(tiny_model)
    kept = {name: weight.clone() for name, weight in tuned.named_parameters()}
    start = dict(before.named_parameters())
    for share in scaled_changes(tuned, before, (0.0, 0.25, 1.0)):
        for name, weight in tuned.named_parameters():
            expected = start[name] + share * (kept[name] - start[name])
            torch.testing.assert_close(weight.detach(), expected.detach())
    for _ in scaled_changes(tuned, before, (0.5, 0.75)):
        break
    assert all(torch.equal(weight, kept[name]) for name, weight in tuned.named_parameters())


@pytest.mark.parametrize("num_tokens", [4, 300])
def test_an_answer_ends_where_the_model_before_ended_it(tiny_model: Path, tmp_path: Path, num_tokens, caplog) -> None:
    """One that was cut at the limit has no end token to score: the model before did not say it."""
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"prompt": f"{i}+1="}) + "\n" for i in range(6)))
    tokenizer, before = AutoTokenizer.from_pretrained(tiny_model), AutoModelForCausalLM.from_pretrained(tiny_model)
    splits, path = {"rows": read_general_rows(str(tmp_path / "rows.jsonl"))}, tmp_path / "answers.jsonl"
    caplog.set_level(logging.INFO)
    for _ in range(2):  # asked, and read again
        rows = answer_rows(splits, before, RowTokeniser(tokenizer), path, max_new_tokens=num_tokens, batch_size=6)[
            "rows"
        ]
        for i, row in enumerate(rows):
            prompt = tokenizer(f"{i}+1=", return_tensors="pt")
            said = before.generate(**prompt, max_new_tokens=num_tokens, do_sample=False)[0, prompt.input_ids.shape[1] :]
            has_ended = tokenizer.eos_token_id in said
            assert (row["labels"][-1] == tokenizer.eos_token_id) == has_ended
            assert row["input_ids"][-1] == tokenizer.eos_token_id
        num_cut = sum(row["labels"][-1] == -100 for row in rows)
        assert (f"{num_cut} of 6 general answers were cut at {num_tokens} tokens" in caplog.text) == (num_cut > 0)
