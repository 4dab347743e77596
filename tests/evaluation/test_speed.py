"""Speeds are medians over turns that the models take, and state what they were measured on."""

from __future__ import annotations

import statistics

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import moh
from moh.evaluation import cpu_name, measure_speed
from moh.evaluation import speed as machine


@pytest.fixture(scope="module")
def models():
    config = LlamaConfig(
        vocab_size=30, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4
    )
    dense = LlamaForCausalLM(config).train()
    return {"dense": dense, "moh": moh.convert(dense, shared_heads=1, active_heads=2, router="query_norm")}


class _Calls:
    """Records (model, tokens read) of each forward pass."""

    def __init__(self, models) -> None:
        self.seen: list[tuple[str, int]] = []
        self._handles = [
            model.register_forward_pre_hook(self._hook(name), with_kwargs=True) for name, model in models.items()
        ]

    def _hook(self, name: str):
        return lambda module, args, kwargs: self.seen.append((name, kwargs["input_ids"].shape[1]))

    def __enter__(self):
        return self

    def __exit__(self, *error) -> None:
        for handle in self._handles:
            handle.remove()


def test_models_take_turns_and_each_round_begins_with_another(models) -> None:
    with _Calls(models) as calls:
        measure_speed(models, prompt_tokens=7, decode_tokens=3, repeats=2)
    one_round = [7, 1, 1, 1]
    order = ["dense", "moh", "dense", "moh", "moh", "dense"]  # the first two are warm-up
    assert calls.seen == [(name, n) for name in order for n in one_round]


def test_the_report_holds_medians_their_spread_and_the_machine(models) -> None:
    report = measure_speed(models, prompt_tokens=8, decode_tokens=2, batch_size=2, repeats=3)
    assert list(report.models) == ["dense", "moh"]
    for speed in report.models.values():
        for rate in (speed.prefill, speed.decode):
            assert len(rate.values) == 3
            assert rate.median == statistics.median(rate.values)
            assert min(rate.values) <= rate.low <= rate.median <= rate.high <= max(rate.values)
            assert rate.low > 0
    assert (report.threads, report.dtype, report.batch_size) == (torch.get_num_threads(), "float32", 2)
    assert (report.prompt_tokens, report.decode_tokens, report.repeats) == (8, 2, 3)
    assert report.device == cpu_name()
    assert models["dense"].training and not models["moh"].training  # unchanged


def test_rates_are_tokens_per_second(models, monkeypatch: pytest.MonkeyPatch) -> None:
    from moh.evaluation import speed

    monkeypatch.setattr(speed, "_time_once", lambda model, prompt, decode_tokens: (0.5, 0.25))
    report = measure_speed(models, prompt_tokens=8, decode_tokens=5, batch_size=2, repeats=2)
    assert report.models["moh"].prefill.median == 2 * 8 / 0.5
    assert report.models["moh"].decode.median == 2 * 5 / 0.25


def test_a_given_prompt_is_used(models) -> None:
    report = measure_speed(models, prompt=torch.ones(3, 5, dtype=torch.long), decode_tokens=1, repeats=1)
    assert (report.batch_size, report.prompt_tokens) == (3, 5)


@pytest.mark.parametrize("name", ["prompt_tokens", "decode_tokens", "batch_size", "repeats"])
def test_numbers_below_one_are_refused(models, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        measure_speed(models, **{name: 0})
    with pytest.raises(ValueError, match="at least one model"):
        measure_speed({})


@pytest.mark.parametrize(
    ("cpuinfo", "name"),
    [
        ("model name\t: Intel(R) Xeon(R)  CPU @ 2.0GHz\n\nmodel name: other", "Intel(R) Xeon(R) CPU @ 2.0GHz"),
        (
            "vendor_id : AuthenticAMD\ncpu family: 25\nmodel : 1\nmodel name : AMD EPYC\nstepping: 2",
            "AMD EPYC (cpu family 25, model 1, stepping 2)",
        ),
    ],
    ids=["named", "hidden_by_a_virtual_machine"],
)
def test_the_cpu_name_is_read_from_the_system(tmp_path, monkeypatch, cpuinfo: str, name: str) -> None:
    (tmp_path / "cpuinfo").write_text(cpuinfo)
    monkeypatch.setattr(machine, "Path", lambda path: tmp_path / "cpuinfo")
    assert cpu_name() == name


def test_a_system_without_cpuinfo_still_has_a_name(monkeypatch) -> None:
    monkeypatch.setattr(machine, "_cpuinfo", dict)
    assert cpu_name()


def test_training_steps_are_timed_on_request_and_leave_no_gradients(models, monkeypatch: pytest.MonkeyPatch) -> None:
    from moh.evaluation import speed

    assert measure_speed(models, prompt_tokens=8, decode_tokens=1, repeats=1).models["moh"].train is None
    original = speed._time_training
    seen = []

    def half_a_second(model, prompt):
        assert original(model, prompt) > 0
        seen.append(any(parameter.grad is not None for parameter in model.parameters()))
        return 0.5

    monkeypatch.setattr(speed, "_time_training", half_a_second)
    report = measure_speed(models, prompt_tokens=8, decode_tokens=1, batch_size=2, repeats=2, training=True)
    assert report.models["moh"].train.values == (32.0, 32.0)
    assert seen == [False] * 6
