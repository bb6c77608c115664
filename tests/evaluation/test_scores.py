import json
import shutil
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from maskft.errors import MaskftError
from maskft.evaluation.samples import open_folder, sample_folder, write_samples
from maskft.evaluation.scores import Scored, build_results, metrics_of, summarise
from maskft.scoring.statistics import unpaired_detectable


def row(item: object, value=None, metric: str = "acc", **more) -> dict:
    values = {metric: value} if value is not None else more
    return {"doc_id": item, "filter": "none", "metrics": list(values), "doc_hash": f"hash of {item}"} | values | more


def nll(item: object, total: float, count: int, prompt=None) -> dict:
    return row(item, {"sum": total, "count": count}, "nll", doc={"prompt": prompt or f"{item}?", "completion": "c"})


def protocol(model: str, task: str = "t", **groups) -> dict:
    asked = {"dtype": "float32", "version": "1", "num_samples": 1, "generation_kwargs": None}
    return {"model": model, "task": task, "n": 4, "groups": groups, "data": {"sha256": task}} | asked


def save(root: Path, model: str, rows: list[dict], task: str = "t", **groups) -> Path:
    folder = sample_folder(root, model, task)
    open_folder(folder, protocol(model, task, **groups))
    write_samples(folder, rows)
    return folder


def scores_of(root: Path, rows: list[dict]) -> list[dict]:
    """Of one model, from its file alone."""
    return build_results([(protocol("m"), save(root, "m", rows))])["scores"]


def test_a_score_is_recomputed_from_the_file_alone(tmp_path: Path) -> None:
    (score,) = scores_of(tmp_path, [row(str(i), i < 3) for i in range(10)])
    assert (score["metric"], score["score"], score["n"], score["num_samples"]) == ("acc,none", 0.3, 10, 10)
    assert score["interval"] == "95 %, Wilson"
    # Wilson's interval for 3 of 10: 0.108 to 0.603 (Newcombe 1998's formula).
    assert (score["low"], score["high"]) == pytest.approx((0.1078, 0.6032), abs=1e-4)
    assert score["detectable_difference"] == unpaired_detectable(np.arange(10) < 3, np.ones(10))
    for model in "ab":  # so few items can show no difference
        save(tmp_path / "few", model, [row(str(i), i < 2) for i in range(5)])
    results = json.loads(json.dumps(summarise(tmp_path / "few"), allow_nan=False))
    assert {row["detectable_difference"] for row in results["scores"] + results["comparisons"]} == {None}


def test_instructions_are_weighed_and_the_headline_is_the_mean(tmp_path: Path) -> None:
    verdicts = [(True, [True, True]), (False, [True, False, False]), (False, [False])]
    rows = [row(i, prompt_level_strict_acc=p, inst_level_strict_acc=inst) for i, (p, inst) in enumerate(verdicts)]
    scores = {s["metric"]: s["score"] for s in scores_of(tmp_path, rows)}
    expected = {"strict_acc_mean,none": (1 / 3 + 3 / 6) / 2, "prompt_level_strict_acc,none": 1 / 3}
    assert scores == pytest.approx(expected | {"inst_level_strict_acc,none": 3 / 6})
    assert next(iter(scores)) == "strict_acc_mean,none"


def test_nll_is_per_token_and_not_compared_across_tokenizers(tmp_path: Path) -> None:
    for model, counts in {"a": (2, 3, 5), "b": (2, 3, 5), "c": (2, 3, 6)}.items():
        save(tmp_path, model, [nll(i, 2.0 * i, count) for i, count in enumerate(counts)])
    results = summarise(tmp_path)
    assert results["scores"][0]["score"] == pytest.approx(6 / 10)
    told = [("p_holm" in c, "not_compared" in c) for c in results["comparisons"]]
    assert told == [(True, False), (False, True), (False, True)]


def test_models_that_were_asked_otherwise_are_not_compared(tmp_path: Path) -> None:
    entries = [
        (protocol(m) | {"num_fewshot": shots}, save(tmp_path, m, [row("1", 1), row("2", 0)]))
        for m, shots in (("a", 0), ("b", 5), ("c", 5))
    ]
    told = [c.get("not_compared") for c in build_results(entries)["comparisons"]]
    assert told == ["the models were asked with another num_fewshot"] * 2 + [None]


def test_losses_of_one_conversation_are_one_draw(tmp_path: Path) -> None:
    def turns(question: str) -> list[list[dict[str, str]]]:
        first = [{"role": "user", "content": question}]
        return [first, [*first, {"role": "assistant", "content": "a"}, {"role": "user", "content": "and?"}]]

    for model, shift in {"a": 0.0, "b": 0.1}.items():
        asked = [(question, i, prompt) for question in "1234" for i, prompt in enumerate(turns(question))]
        save(tmp_path, model, [nll(f"{q}{i}", 2.0 + i + shift * int(q), 3, prompt) for q, i, prompt in asked])
    results = summarise(tmp_path)
    score, (comparison,) = results["scores"][0], results["comparisons"]
    assert (score["score"], score["n"], score["num_samples"]) == (pytest.approx(20 / 24), 4, 8)
    # The signs of four problems can be flipped in 16 ways, of which two are as extreme.
    assert (comparison["n"], comparison["difference"]) == (4, pytest.approx(0.1 * 20 / 24))
    assert comparison["p"] == pytest.approx(2 / 16)


def test_samples_of_one_problem_are_one_draw(tmp_path: Path) -> None:
    drawn = {"a": (1, 1), "b": (0, 1)}
    (score,) = scores_of(tmp_path, [row(item, v, draw=d) for item, of in drawn.items() for d, v in enumerate(of)])
    assert (score["score"], score["n"], score["num_samples"]) == (0.75, 2, 4)
    assert score["interval"] == "95 %, bootstrap over problems"


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_scores_of_nothing_or_everything_claim_no_certainty(value: float, tmp_path: Path) -> None:
    right = bool(value)
    ifeval = {"prompt_level_strict_acc": right, "inst_level_strict_acc": [right, right]}
    tasks = {
        "ifeval": [row(i, **ifeval) for i in range(30)],
        "draws": [row(str(i), right, draw=d) for i in range(30) for d in range(4)],
        "part": [row(str(i), 0.5 * value) for i in range(30)],
    }
    for task, rows in tasks.items():
        for model in "ab":
            save(tmp_path, model, rows, task)
    results = summarise(tmp_path)
    assert {score["metric"] for score in results["scores"]} >= {"strict_acc_mean,none", "acc,none"}
    for score in results["scores"]:
        assert score["low"] <= score["score"] <= score["high"]
        assert min(score["high"] - score["low"], score["detectable_difference"]) > 0.1
        assert "Wilson" in score["interval"]
    for comparison in results["comparisons"]:
        assert (comparison["low"], comparison["high"]) == (0, 0)
        assert comparison["interval"].endswith("all differ alike")
        assert comparison["detectable_difference"] > 0.05


def test_losses_that_are_all_alike_are_no_shares(tmp_path: Path) -> None:
    (score,) = scores_of(tmp_path, [nll(str(i), 0.0, 2) for i in range(30)])
    assert (score["low"], score["high"], score["detectable_difference"]) == (0, 0, 0)
    assert score["interval"] == "95 %, bootstrap over problems"


@settings(max_examples=5, deadline=None)
@given(data=st.data(), n=st.integers(2, 8))
def test_order_changes_nothing_and_swapping_mirrors(data, n, tmp_path_factory) -> None:
    draw = st.lists(st.booleans(), min_size=n, max_size=n)
    answers = {"a": data.draw(draw), "b": data.draw(draw)}
    first, mixed = [
        [(protocol(m), save(root, m, [row(str(i), right[i]) for i in places])) for m, right in answers.items()]
        for root, places in (
            (tmp_path_factory.mktemp("x"), range(n)),
            (tmp_path_factory.mktemp("y"), data.draw(st.permutations(range(n)))),
        )
    ]
    forth = build_results(first)
    assert forth == build_results(mixed)
    (there,), (back,) = forth["comparisons"], build_results(first[::-1])["comparisons"]
    assert there["difference"] == pytest.approx(-back["difference"])
    assert (there["low"], there["high"]) == pytest.approx((-back["high"], -back["low"]))
    assert (there["p"], there["num_only_to_right"]) == (back["p"], back["num_only_from_right"])
    assert there["difference"] * n == pytest.approx(there["num_only_to_right"] - there["num_only_from_right"])


def test_holm_runs_over_all_comparisons(tmp_path: Path) -> None:
    for task in ("t", "u"):
        for model, num in {"a": 0, "b": 6, "c": 12}.items():
            save(tmp_path, model, [row(str(i), i < num) for i in range(12)], task)
    comparisons = summarise(tmp_path)["comparisons"]
    assert len(comparisons) == 6
    assert min(c["p_holm"] for c in comparisons) == pytest.approx(6 * min(c["p"] for c in comparisons))
    assert (comparisons[1]["test"], comparisons[1]["p"]) == ("McNemar, exact", pytest.approx(2 / 2**12))


def test_another_protocol_or_a_damaged_line_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path, "m", [row("a", 1, resps=[["\ud83d x"]]), row("b", 0)])  # half a surrogate pair
    assert [r["doc_id"] for r in open_folder(folder, protocol("m"))] == ["a", "b"]
    assert json.loads((folder / "protocol.json").read_text())["model"] == "m"
    with pytest.raises(MaskftError, match="n was 4 and is now 5"):
        open_folder(folder, protocol("m") | {"n": 5})
    path = folder / "samples.jsonl"
    path.write_text("{}\n" + path.read_text())
    with pytest.raises(
        MaskftError,
        match=r"samples\.jsonl, sample 1: `doc_id` must be text or a whole number, got None; remove the file",
    ):
        summarise(tmp_path)
    (folder / "protocol.json").unlink()
    with pytest.raises(MaskftError, match=r"protocol\.json is no file; remove"):
        open_folder(folder, protocol("m"))
    path.unlink()
    with pytest.raises(MaskftError, match=r"samples\.jsonl cannot be read"):
        build_results([(protocol("m"), folder)])
    with pytest.raises(MaskftError, match="holds no samples"):
        summarise(tmp_path / "other")
    for model, second in (("a", "2"), ("b", "3")):
        save(tmp_path / "other", model, [row("1", 1), row(second, 0)])
    with pytest.raises(MaskftError, match="did not answer the same items"):
        summarise(tmp_path / "other")


def test_folders_of_different_models_differ(tmp_path: Path) -> None:
    names = ["m", "x/m", "y/m", "y/m+a", "y/m+b/a", "m+a", "nll:a.jsonl", "nll:b/a.jsonl", ".", "..", "../.."]
    folders = {sample_folder(tmp_path, name, "t") for name in names}
    assert len(folders) == len(names)
    assert all(folder.resolve().parent.parent == tmp_path for folder in folders)
    assert sample_folder(tmp_path, "m", "gsm8k") == tmp_path / "m" / "gsm8k"


@pytest.mark.parametrize(
    ("metric", "second", "message"),
    [
        ("strict_acc_mean,none", row("b", 1, "prompt_level_strict_acc"), "Not every sample has a value for strict_acc"),
        ("acc,none", row("b", 1, "score"), "Not every sample has a value for acc,none"),
        ("nll,none", nll("b", float("nan"), 2), "item b has a nll of nan over 2, which is no finite number"),
        ("nll,none", nll("b", float("inf"), 2), "item b has a nll of inf over 2, which is no finite number"),
    ],
)
def test_a_metric_that_not_all_samples_have_is_an_error(metric: str, second: dict, message: str) -> None:
    with pytest.raises(MaskftError, match=message):
        Scored([[nll("a", 1.0, 1), second] if "nll" in metric else [second]], metric)


def test_metrics_with_a_number_for_each_item_are_scored_by_filter() -> None:
    rows = [row(i, acc=1.0, word_perplexity=[-2.0, 4], f1=[0, 1], bleu=["a", "b"]) for i in range(3)]
    rows += [row(i, acc=0.0, filter="strict") for i in range(3)]
    values = {metric: float(Scored([rows], metric).parts.sum()) for metric in metrics_of(rows)}
    assert values == {"acc,none": 1.0, "word_perplexity,none": 0.5, "acc,strict": 0.0}  # nats a word


def save_group(root: Path, num_tasks: int, *, weight_by_size: bool = True) -> dict:
    """Two models on tasks of 2, 3, ... items, of which the second gets the first item of each right more often."""
    about = {"num_tasks": num_tasks, "metrics": {"acc": weight_by_size}}
    for number in range(num_tasks):
        for model, num_right in (("a", 0), ("b", 1)):
            rows = [row(i, float(i < num_right)) for i in range(number + 2)]
            save(root, model, rows, f"t{number:02}", whole=about)
    return summarise(root)


@pytest.mark.parametrize(("weight_by_size", "score"), [(True, 3 / 9), (False, (1 / 2 + 1 / 3 + 1 / 4) / 3)])
def test_a_group_is_scored_as_a_whole_and_by_task(weight_by_size: bool, score: float, tmp_path: Path) -> None:
    results = save_group(tmp_path, 3, weight_by_size=weight_by_size)
    whole = [row for row in results["scores"] if "is_part" not in row]
    assert [(row["task"], row["model"], row["n"]) for row in whole] == [("whole", "a", 9), ("whole", "b", 9)]
    assert (whole[1]["score"], whole[1]["protocol"]["n"]) == (pytest.approx(score), 12)
    assert whole[0]["protocol"]["data"] == whole[1]["protocol"]["data"] != {"sha256": "t00"}
    assert {row["task"] for row in results["scores"] if "is_part" in row} == {"t00", "t01", "t02"}
    first, *parts = results["comparisons"]
    assert first["difference"] == pytest.approx(score)
    assert first["p"] == first["p_holm"], "the tasks of a group are corrected by themselves"
    assert first["test"] == ("McNemar, exact" if weight_by_size else "sign flips by problem")
    assert [row["task"] for row in parts] == ["t00", "t01", "t02"]


def test_tasks_of_a_large_group_are_clusters_and_one_that_was_not_finished_has_no_whole(tmp_path: Path) -> None:
    results = save_group(tmp_path / "large", 12)
    whole = next(row for row in results["scores"] if row["model"] == "b")
    assert (whole["task"], whole["n"], whole["num_samples"]) == ("whole", 12, sum(range(2, 14)))
    assert whole["interval"] == "95 %, bootstrap over problems"
    assert results["comparisons"][0]["n"] == 12
    save_group(tmp_path, 3)
    shutil.rmtree(sample_folder(tmp_path, "a", "t01"))
    assert {row["model"] for row in summarise(tmp_path)["scores"] if row["task"] == "whole"} == {"b"}
    shutil.rmtree(sample_folder(tmp_path, "b", "t01"))
    results = summarise(tmp_path)
    assert {row["task"] for row in results["scores"]} == {"t00", "t02"}
    assert not any("is_part" in row for row in results["scores"])


def test_further_metrics_are_compared_and_corrected_by_themselves(tmp_path: Path) -> None:
    for model, right in (("a", 0), ("b", 8)):
        save(tmp_path, model, [row(i, acc=float(i < right), acc_norm=float(i < right)) for i in range(12)])
    main, further = summarise(tmp_path)["comparisons"]
    assert (main["metric"], main.get("is_part")) == ("acc,none", None)
    assert (further["metric"], further["is_part"]) == ("acc_norm,none", True)
    assert main["p_holm"] == main["p"] == further["p_holm"] == pytest.approx(2 / 2**8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metrics": ["acc", "f1"]}, "the verdict f1 is missing or a text"),
        ({"acc": "yes"}, "the verdict acc is missing or a text"),
        ({"metrics": "acc"}, "`metrics` must be a list"),
        ({"filter": ["none"]}, "`filter` must be text"),
        ({"doc_id": [1]}, "`doc_id` must be text or a whole number, got .1"),
        ({"draw": []}, "`draw` must be a whole number or null, got"),
        ({"doc_hash": 3}, "`doc_hash` must be text or null, got 3"),
        ({"acc": {"sum": "1", "count": 1}}, "acc of nan over 1, which is no finite number"),
        ({"acc": 10**400}, "acc of inf over 1, which is no finite number"),
        ({"acc": {"sum": 1, "count": -1}}, "acc of 1 over -1, which is no finite number"),
        ({"metrics": ["nll"], "nll": {"sum": 1, "count": 1}, "doc": {"prompt": 3}}, "`prompt` must be .*text.*, got 3"),
        ({"metrics": ["nll"], "nll": {"sum": 1, "count": 1}}, "`doc` must be a mapping, got None; remove the file"),
    ],
)
def test_a_sample_of_other_types_is_refused(tmp_path, change, message) -> None:
    save(tmp_path, "m", [row("a", 1), row("b", 0) | change])
    with pytest.raises(MaskftError, match=message):
        summarise(tmp_path)


def test_items_that_stand_twice_are_refused(tmp_path) -> None:
    """Two processes once wrote one file of samples, and each item of both counted."""
    drawn = [row("a", 1, draw=draw) for draw in (0, 1)]
    folder = save(tmp_path, "m", [*drawn, row("a", 1, filter="other"), drawn[1]])
    for read in (lambda: summarise(tmp_path), lambda: open_folder(folder, protocol("m"))):
        with pytest.raises(
            MaskftError, match=r"samples\.jsonl holds item a of draw 1 2 times; remove the file and run"
        ):
            read()


@pytest.mark.parametrize(
    "change",
    [{"model": []}, {"task": None}, {"n": "4"}, {"data": []}, {"data": {}}, {"groups": {"g": {}}}, {"dtype": 3}],
)
@pytest.mark.parametrize("name", ["protocol.json", "results.json"])
def test_a_protocol_or_results_of_other_types_are_refused(tmp_path, change, name) -> None:
    folder = save(tmp_path, "m", [row("a", 1), row("b", 0)])
    if name == "protocol.json":
        (folder / name).write_text(json.dumps(protocol("m") | change))
    else:
        (tmp_path / name).write_text(json.dumps({"scores": [change]}))
    with pytest.raises(MaskftError, match=name):
        summarise(tmp_path)
