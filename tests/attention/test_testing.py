"""Promises of the checks that users run on their own machine: they pass, fail and skip as the backends do."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from moh.attention import BACKENDS, Call, testing
from moh.attention.testing import check, kinds
from moh.attention.testing_inputs import make_inputs

SDPA = BACKENDS["sdpa"]


def test_a_backend_that_is_right_passes_every_check_it_serves():
    outcomes = list(check(SDPA, large=False))
    assert len(outcomes) > 80
    assert [o for o in outcomes if o.failure or o.skipped] == []


def test_a_backend_that_is_wrong_fails_and_the_other_checks_go_on(monkeypatch):
    def wrong(call: Call) -> torch.Tensor:
        return SDPA.attend(call) * 1.001

    broken = dataclasses.replace(SDPA, attend=wrong)
    monkeypatch.setattr("moh.attention.backends.BACKENDS", BACKENDS | {"sdpa-1": broken})
    outcomes = list(check(dataclasses.replace(broken, name="sdpa-1"), large=False))
    failures = [o for o in outcomes if o.failure]
    assert len(failures) > 50 and all("off by" in o.failure or "not 0" in o.failure for o in failures)


def test_inputs_that_cannot_be_made_are_a_failure_and_not_the_end(monkeypatch):
    """For example on a device that an earlier kernel made unusable."""

    def broken(**kind: object) -> None:
        raise RuntimeError("the device is lost")

    monkeypatch.setattr("moh.attention.testing.make_inputs", broken)
    outcomes = list(check(SDPA, large=False))
    assert len(outcomes) > 80 and {o.failure for o in outcomes} == {"RuntimeError: the device is lost"}


def test_the_layout_that_projections_leave_is_checked():
    inputs = make_inputs(**dict(kinds(large=False))["token-major, full"])
    assert not inputs.q.is_contiguous() and inputs.q.transpose(1, 2).is_contiguous()


def test_what_a_backend_cannot_serve_is_skipped_with_its_reason():
    outcomes = list(check(BACKENDS["flex"], large=False))
    assert {o.skipped for o in outcomes} >= {"FlexAttention has no gradients on the CPU"}
    assert all(o.skipped for o in outcomes)


def test_checks_have_names_of_their_own():
    names = [name for name, _ in kinds()]
    assert len(set(names)) == len(names)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_command_says_that_there_is_no_gpu(capsys):
    assert testing.main(["--device", "cuda"]) == 2
    assert "finds no CUDA device" in capsys.readouterr().err


def test_summary_counts_and_names_what_failed_and_why_something_was_skipped():
    outcome = testing.Outcome
    lines = testing.summary("x", [outcome("a"), outcome("b", failure="off"), outcome("c", skipped="no"), outcome("d")])
    assert lines[0] == "x: 2 of 4 checks passed, 1 failed, 1 skipped"
    assert lines[1:] == ["  skipped 1: no", "  FAILED b: off"]
