import json
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from maskft.errors import MaskftError
from maskft.evaluation.samples import SampleFile, read_samples, sample_folder
from maskft.evaluation.scores import Scored, build_results, score_from_samples, summarise
from maskft.scoring.statistics import unpaired_detectable

pytest.importorskip("statsmodels")


def row(item: str, value, metric: str = "accuracy", **more) -> dict:
    return {"item": item, "prompt": f"{item}?", "output": "o", "num_tokens": 1, "verdict": {metric: value}} | more


def protocol(model: str, task: str = "t") -> dict:
    return {"model": model, "task": task, "n": 4}


def save(root: Path, model: str, rows: list[dict], task: str = "t") -> Path:
    folder = sample_folder(root, model, task)
    SampleFile(folder, protocol(model, task)).append(rows)
    return folder


def test_a_score_is_recomputed_from_the_file_alone(tmp_path: Path) -> None:
    folder = save(tmp_path, "m", [row(str(i), i < 3) for i in range(10)])
    (score,) = score_from_samples(folder)
    assert (score["metric"], score["score"], score["n"], score["num_samples"]) == ("accuracy", 0.3, 10, 10)
    assert score["interval"] == "95 %, Wilson"
    # Wilson's interval for 3 of 10: 0.108 to 0.603 (Newcombe 1998's formula).
    assert (score["low"], score["high"]) == pytest.approx((0.1078, 0.6032), abs=1e-4)
    assert score["detectable_difference"] == unpaired_detectable(np.arange(10) < 3, np.ones(10))


def test_a_difference_that_so_few_items_cannot_show_is_null(tmp_path: Path) -> None:
    for model in "ab":
        save(tmp_path, model, [row(str(i), i < 2) for i in range(5)])
    results = json.loads(json.dumps(summarise(tmp_path), allow_nan=False))
    assert {row["detectable_difference"] for row in results["scores"] + results["comparisons"]} == {None}


def test_instructions_are_weighed_and_the_headline_is_the_mean(tmp_path: Path) -> None:
    verdicts = [(True, [True, True]), (False, [True, False, False]), (False, [False])]
    rows = [
        row(str(i), None) | {"verdict": {"prompt_level_strict_acc": p, "inst_level_strict_acc": inst}}
        for i, (p, inst) in enumerate(verdicts)
    ]
    scores = {s["metric"]: s["score"] for s in score_from_samples(save(tmp_path, "m", rows))}
    assert scores["prompt_level_strict_acc"] == pytest.approx(1 / 3)
    assert scores["inst_level_strict_acc"] == pytest.approx(3 / 6)
    assert scores["strict_acc_mean"] == pytest.approx((1 / 3 + 3 / 6) / 2)
    assert next(iter(scores)) == "strict_acc_mean"


def test_nll_is_per_token_and_not_compared_across_tokenizers(tmp_path: Path) -> None:
    def rows(counts):
        return [row(str(i), {"sum": 2.0 * i, "count": c}, "nll") for i, c in enumerate(counts)]

    folders = {m: save(tmp_path, m, rows(c)) for m, c in {"a": (2, 3, 5), "b": (2, 3, 5), "c": (2, 3, 6)}.items()}
    assert score_from_samples(folders["a"])[0]["score"] == pytest.approx(6 / 10)
    comparisons = summarise(tmp_path)["comparisons"]
    assert [("p_holm" in c, "not_compared" in c) for c in comparisons] == [(True, False), (False, True), (False, True)]


def test_losses_of_one_conversation_are_one_draw(tmp_path: Path) -> None:
    def rows(shift: float) -> list[dict]:
        def turns(question: str) -> list[list[dict[str, str]]]:
            first = [{"role": "user", "content": question}]
            return [first, [*first, {"role": "assistant", "content": "a"}, {"role": "user", "content": "and?"}]]

        return [
            row(f"{question}{i}", {"sum": 2.0 + i + shift * int(question), "count": 3}, "nll", prompt=prompt)
            for question in "1234"
            for i, prompt in enumerate(turns(question))
        ]

    folders = {m: save(tmp_path, m, rows(shift)) for m, shift in {"a": 0.0, "b": 0.1}.items()}
    (score,) = score_from_samples(folders["a"])
    assert (score["score"], score["n"], score["num_samples"]) == (pytest.approx(20 / 24), 4, 8)
    (comparison,) = summarise(tmp_path)["comparisons"]
    assert comparison["n"] == 4
    assert comparison["difference"] == pytest.approx(0.1 * 20 / 24)
    # The signs of four problems can be flipped in 16 ways, of which two are as extreme.
    assert comparison["p"] == pytest.approx(2 / 16)


def test_samples_of_one_problem_are_one_draw(tmp_path: Path) -> None:
    rows = [
        row(item, value, draw=d)
        for item, values in {"a": (1, 1), "b": (0, 1)}.items()
        for d, value in enumerate(values)
    ]
    (score,) = score_from_samples(save(tmp_path, "m", rows))
    assert (score["score"], score["n"], score["num_samples"]) == (0.75, 2, 4)
    assert score["interval"] == "95 %, bootstrap over problems"


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_scores_of_nothing_or_everything_claim_no_certainty(value: float, tmp_path: Path) -> None:
    right = bool(value)
    ifeval = {"prompt_level_strict_acc": right, "inst_level_strict_acc": [right, right]}
    tasks = {
        "ifeval": [row(str(i), None) | {"verdict": ifeval} for i in range(30)],
        "draws": [row(str(i), right, draw=d) for i in range(30) for d in range(4)],
        "part": [row(str(i), 0.5 * value) for i in range(30)],
    }
    for task, rows in tasks.items():
        for model in "ab":
            save(tmp_path, model, rows, task)
    results = summarise(tmp_path)
    assert {score["metric"] for score in results["scores"]} >= {"strict_acc_mean", "accuracy"}
    for score in results["scores"]:
        assert score["low"] <= score["score"] <= score["high"]
        assert score["high"] - score["low"] > 0.1
        assert score["detectable_difference"] > 0.1
        assert "Wilson" in score["interval"]
    for comparison in results["comparisons"]:
        assert (comparison["low"], comparison["high"]) == (0, 0)
        assert comparison["interval"].endswith("all differ alike")
        assert comparison["detectable_difference"] > 0.05


def test_losses_that_are_all_alike_are_no_shares(tmp_path: Path) -> None:
    rows = [row(str(i), {"sum": 0.0, "count": 2}, "nll", prompt=str(i)) for i in range(30)]
    (score,) = score_from_samples(save(tmp_path, "m", rows))
    assert (score["low"], score["high"], score["detectable_difference"]) == (0, 0, 0)
    assert score["interval"] == "95 %, bootstrap over problems"


@settings(max_examples=5, deadline=None)
@given(data=st.data(), n=st.integers(2, 8))
def test_order_changes_nothing_and_swapping_mirrors(data, n, tmp_path_factory) -> None:
    draw = st.lists(st.booleans(), min_size=n, max_size=n)
    a, b = data.draw(draw), data.draw(draw)
    order = data.draw(st.permutations(range(n)))
    first, second = tmp_path_factory.mktemp("x"), tmp_path_factory.mktemp("y")
    entries = {}
    for root, places in ((first, range(n)), (second, order)):
        entries[root] = [
            (protocol(name), save(root, name, [row(str(i), values[i]) for i in places]))
            for name, values in (("a", a), ("b", b))
        ]
    forth, mixed = build_results(entries[first]), build_results(entries[second])
    assert forth == mixed
    (there,), (back,) = forth["comparisons"], build_results(entries[first][::-1])["comparisons"]
    assert there["difference"] == pytest.approx(-back["difference"])
    assert (there["low"], there["high"]) == pytest.approx((-back["high"], -back["low"]))
    assert there["p"] == back["p"]
    assert there["num_only_to_right"] == back["num_only_from_right"]
    assert there["difference"] * n == pytest.approx(there["num_only_to_right"] - there["num_only_from_right"])


def test_holm_runs_over_all_comparisons(tmp_path: Path) -> None:
    right = {"a": 0, "b": 6, "c": 12}
    for task in ("t", "u"):
        for model, num in right.items():
            save(tmp_path, model, [row(str(i), i < num) for i in range(12)], task)
    comparisons = summarise(tmp_path)["comparisons"]
    assert len(comparisons) == 6
    assert min(c["p_holm"] for c in comparisons) == pytest.approx(6 * min(c["p"] for c in comparisons))
    assert comparisons[1]["test"] == "McNemar, exact"
    assert comparisons[1]["p"] == pytest.approx(2 / 2**12)


def test_a_torn_last_line_is_cut_off_and_asked_for_again(tmp_path: Path) -> None:
    folder = save(tmp_path, "m", [row("a", 1), row("b", 0)])
    path = folder / "samples.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-7])
    assert [r["item"] for r in read_samples(folder)] == ["a"]
    file = SampleFile(folder, protocol("m"))
    assert (file.has("a"), file.has("b")) == (True, False)
    file.append([row("a", 1), row("b", 0)])
    assert path.read_bytes() == whole


def test_another_protocol_or_a_damaged_line_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path, "m", [row("a", 1), row("b", 0)])
    with pytest.raises(MaskftError, match="n was 4 and is now 5"):
        SampleFile(folder, protocol("m") | {"n": 5})
    path = folder / "samples.jsonl"
    path.write_text("{}\n" + path.read_text())
    with pytest.raises(MaskftError, match=r"samples\.jsonl, line 1, is damaged"):
        score_from_samples(folder)
    path.unlink()
    with pytest.raises(MaskftError, match=r"There is no .*samples\.jsonl"):
        score_from_samples(folder)
    with pytest.raises(MaskftError, match="holds no samples"):
        summarise(tmp_path / "other")


def test_other_items_are_not_compared(tmp_path: Path) -> None:
    save(tmp_path, "a", [row("1", 1), row("2", 0)])
    save(tmp_path, "b", [row("1", 1), row("3", 0)])
    with pytest.raises(MaskftError, match="did not answer the same items"):
        summarise(tmp_path)


def test_folders_of_different_models_differ(tmp_path: Path) -> None:
    names = ["m", "x/m", "y/m", "y/m+a", "y/m+b/a", "m+a", "nll:a.jsonl", "nll:b/a.jsonl"]
    folders = {sample_folder(tmp_path, name, "t") for name in names}
    assert len(folders) == len(names)
    assert all(folder.parent.parent == tmp_path for folder in folders)
    assert sample_folder(tmp_path, "m", "gsm8k") == tmp_path / "m" / "gsm8k"


def test_a_metric_that_a_row_lacks_is_an_error() -> None:
    with pytest.raises(MaskftError, match="has no verdict for accuracy"):
        Scored([row("a", 1), row("b", 1, "other")], "accuracy")


@pytest.mark.parametrize("value", [float("nan"), {"sum": float("inf"), "count": 2}])
def test_a_value_that_is_no_number_is_an_error(value) -> None:
    with pytest.raises(MaskftError, match=r"item b has a nll of (nan|inf), which is no finite number"):
        Scored([row("a", 1.0, "nll"), row("b", value, "nll")], "nll")


def test_text_that_is_half_a_surrogate_pair_can_be_kept(tmp_path: Path) -> None:
    folder = save(tmp_path, "m", [row("a", 1, output="\ud83d x"), row("b", 0)])
    assert len(read_samples(folder)) == 2
    assert json.loads((folder / "protocol.json").read_text())["model"] == "m"
