import pytest

from maskft.errors import MaskftError
from maskft.training.arguments import MaskArguments, TrainingSettings

UNEVALUATED = {"eval_strategy": "no", "load_best_model_at_end": False}


def settings(**given) -> TrainingSettings:
    return TrainingSettings(output_dir="unused", **given)


@pytest.mark.parametrize("prefix", ["eval_", ""])
@pytest.mark.parametrize(
    ("name", "is_greater_better"),
    [
        ("loss", False),
        ("mean_token_accuracy", True),
        ("reasoning_gym_chain_sum", True),
        ("reasoning_gym:chain_sum", True),
        ("nll_a_b_jsonl", False),
    ],
)
def test_a_metric_is_better_as_its_name_says(prefix: str, name: str, is_greater_better: bool) -> None:
    given = settings(metric_for_best_model=prefix + name, eval_tasks="reasoning_gym:chain_sum, nll:a/b.jsonl")
    assert given.greater_is_better is is_greater_better
    assert given.metric_for_best_model.startswith("eval_")
    assert settings(metric_for_best_model="entropy", greater_is_better=False).greater_is_better is False


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("per_device_train_batch_size", 0, "at least 1"),
        ("gradient_accumulation_steps", 0, "at least 1"),
        ("eval_tasks_limit", 0, "at least 1"),
        ("early_stopping_patience", -1, "at least 1 or null"),
        ("per_device_eval_batch_size", None, "a whole number"),
        ("max_steps", 0, "-1 or at least 1"),
        ("save_total_limit", -1, "at least 0 or null"),
        ("seed", -1, "at least 0"),
        ("seed", 2**32, "below 4294967296"),
        ("num_train_epochs", 0, "above 0"),
        ("learning_rate", 0.0, "above 0"),
        ("learning_rate", float("nan"), "a finite number"),
        ("adam_beta2", 1.0, "below 1"),
        ("low_memory", 3, "true or false"),
    ],
)
def test_numbers_out_of_their_range_are_refused(name: str, value: object, allowed: str) -> None:
    with pytest.raises(MaskftError) as error:
        settings(**{name: value})
    assert str(error.value) == f"`{name}` must be {allowed}, got {value!r}."


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"metric_for_best_model": "eval_los"}, r"'eval_los', which no evaluation gives \(nearest: eval_loss"),
        ({"metric_for_best_model": "eval_gsm8k"}, "name its task in --eval_tasks"),
        ({"early_stopping_patience": 2} | UNEVALUATED, "`early_stopping_patience` is 2, but nothing is evaluated"),
        ({"eval_tasks": "nll:a"} | UNEVALUATED, "`eval_tasks` is 'nll:a', but nothing is evaluated"),
        ({"eval_strategy": "no"}, "`load_best_model_at_end` is True, but nothing is evaluated"),
        (
            {"low_memory": True, "gradient_accumulation_steps": 2},
            "to sum over 2 backwards; raise --per_device_train_batch_size",
        ),
        ({"low_memory": True, "max_grad_norm": 1.0}, r"to clip by norm \(--max_grad_norm 1.0\)"),
        ({"low_memory": True, "fp16": True, "bf16": False}, "use --bf16"),
        ({"low_memory": True, "fsdp": "full_shard"}, "train in one process"),
        ({"padding_free": True}, "`padding_free` does not cut rows to `max_length`, which is 1024"),
        ({"use_liger_kernel": True}, "`use_liger_kernel` needs a package that is not installed"),
        ({"hub_strategy": "every_save"}, "`hub_strategy` and `hub_always_push` push checkpoints"),
        ({"hub_always_push": True}, "`hub_strategy` and `hub_always_push` push checkpoints"),
        ({"hub_model_id": "me/x"}, "`hub_model_id` is 'me/x', and nothing is pushed; set --push_to_hub True"),
        ({"trust_remote_code": True}, "which maskft does not run"),
        ({"enable_jit_checkpoint": True}, "a run saves after its step on SIGTERM anyway"),
        ({"activation_offloading": True, "use_cpu": True}, "this run has no GPU"),
        ({"optim_args": "3"}, "`optim_args` must be pairs, as NAME=VALUE,NAME=VALUE, got .3."),
        ({"optim": "galore_adamw"}, "`optim` galore_adamw needs a package that is not installed"),
        ({"lr_scheduler_kwargs": {"a": 1}}, "`lr_scheduler_kwargs` {'a': 1} does not go with"),
        ({"lr_scheduler_kwargs": "a"}, "`lr_scheduler_kwargs` 'a' does not go with `lr_scheduler_type` linear"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "does not go with `lr_scheduler_type` cosine_with_min_lr"),
        ({"model_init_kwargs": "eager"}, "`model_init_kwargs` must be a mapping, got 'eager'"),
        ({"model_init_kwargs": {"dtype": "bfloat16"}}, "may not hold 'dtype'; set --dtype"),
    ],
)
def test_what_cannot_be_used_is_refused_before_anything_is_loaded(given, told, monkeypatch) -> None:
    monkeypatch.setattr("maskft.training.arguments.is_liger_kernel_available", lambda: False)
    monkeypatch.setattr("transformers.trainer_optimizer.is_galore_torch_available", lambda: False)
    with pytest.raises(MaskftError, match=told):
        settings(**given)


def test_scores_that_are_stepped_at_once_have_defaults_of_their_own(monkeypatch) -> None:
    assert (settings().optim, settings().max_grad_norm) == ("adamw_torch_fused", 1.0)
    assert (settings(low_memory=True).optim, settings(low_memory=True).max_grad_norm) == ("adafactor", 0)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(MaskftError, match="train in one process"):
        settings(low_memory=True)


@pytest.mark.parametrize(
    "given",
    [
        {"max_length": None, "save_total_limit": None, "data_seed": None, "early_stopping_patience": None},
        {"metric_for_best_model": "eval_gsm8k"} | UNEVALUATED,
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 0.0}},
        {"optim": "sgd", "model_init_kwargs": {"attn_implementation": "eager"}},
    ],
)
def test_what_goes_together_passes_as_given(given: dict[str, object]) -> None:
    passed = settings(**given)
    assert {name: getattr(passed, name) for name in given} == given


def test_a_threshold_is_refused_where_it_does_nothing() -> None:
    with pytest.raises(MaskftError, match=r"`threshold` = 0\.5 has no effect under selection='topk'"):
        MaskArguments(threshold=0.5).config()
    assert MaskArguments(threshold=0.5, selection="threshold").config().threshold == 0.5


@pytest.mark.parametrize("given", ["wandb", ["mlflow", "wandb"]])
def test_what_a_run_cannot_report_to_is_refused_before_a_model_loads(given, monkeypatch) -> None:
    there = "maskft.training.arguments.get_available_reporting_integrations"
    monkeypatch.setattr(there, lambda: ["mlflow"])
    with pytest.raises(MaskftError, match="`report_to` names wandb, which is not installed; install it, or leave"):
        settings(report_to=given)
    with pytest.raises(MaskftError, match=r"`report_to` names 'wandbb', .*nearest: wandb"):
        settings(report_to=["wandbb"])
    assert settings(report_to="none").report_to == []
    assert settings(report_to="mlflow").report_to == ["mlflow"]
