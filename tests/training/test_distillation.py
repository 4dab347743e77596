"""The distillation loss equals its definition for any chunk size, and the trainer weights it as documented."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from transformers import default_data_collator

from moh.training import TokenBlocks, distillation_loss
from moh.training.language import trainer as distillation
from moh.training.language.recipe import TrainingRecipe
from moh.training.language.trainer import MoHTrainer
from moh.training.session import training_arguments


def _definition(student, teacher, labels, temperature):
    """`T^2 sum_n sum_v p_v (log p_v - log q_v)` over the positions that predict a label."""
    total = 0.0
    for b in range(len(labels)):
        for n in range(labels.shape[1] - 1):
            if labels[b, n + 1] != -100:
                p = F.softmax(teacher[b, n].double() / temperature, dim=-1)
                q = F.softmax(student[b, n].double() / temperature, dim=-1)
                total = total + (p * (p.log() - q.log())).sum()
    return temperature**2 * total


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("chunk", [4, 256], ids=["several_chunks", "one_chunk"])
def test_loss_and_gradient_are_those_of_the_definition(monkeypatch, temperature: float, chunk: int) -> None:
    monkeypatch.setattr(distillation, "_CHUNK", chunk)
    student = torch.randn(2, 7, 11, requires_grad=True)
    teacher = torch.randn(2, 7, 11)
    labels = torch.randint(11, (2, 7))
    labels[0, 3] = labels[1, 6] = -100
    loss = distillation_loss(student, teacher, labels, temperature=temperature)
    (grad,) = torch.autograd.grad(loss, student)
    expected = _definition(student, teacher, labels, temperature)
    (expected_grad,) = torch.autograd.grad(expected, student)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert torch.allclose(grad, expected_grad, atol=1e-5)
    assert (grad[:, -1] == 0).all()  # the last position predicts nothing


def test_a_model_is_at_no_distance_from_itself() -> None:
    logits = torch.randn(1, 5, 7)
    assert distillation_loss(logits, logits, torch.ones(1, 5, dtype=torch.long)).item() == pytest.approx(0, abs=1e-5)


def test_models_of_different_vocabularies_are_refused() -> None:
    with pytest.raises(ValueError, match=r"the same tokenizer and vocabulary\), got \(1, 5, 8\) and \(1, 5, 7\)"):
        distillation_loss(torch.zeros(1, 5, 7), torch.zeros(1, 5, 8), torch.ones(1, 5, dtype=torch.long))


def _trainer(model, out, extra: dict | None = None, **kwargs) -> MoHTrainer:
    extra = {"report_to": [], **(extra or {})}
    settings = TrainingRecipe(str(out), max_steps=2, per_device_train_batch_size=2, extra=extra)
    return MoHTrainer(
        model=model,
        args=training_arguments(settings, precision="fp32"),
        train_dataset=TokenBlocks(torch.randint(20, (8, 6))),
        data_collator=default_data_collator,
        **kwargs,
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weight", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("items", [None, 40], ids=["mean_of_batch", "share_of_step"])
def test_the_trainer_mixes_next_token_loss_teacher_and_balance(
    moh_model, dense, tmp_path, weight, items, smoothing
) -> None:
    moh_model.config.router_aux_loss_coef = 0.1
    options = dict(teacher=dense, distillation_weight=weight, distillation_temperature=2.0)
    trainer = _trainer(moh_model, tmp_path, {"label_smoothing_factor": smoothing}, **options)
    ids = torch.randint(20, (2, 6))
    moh_model.train()
    loss, outputs = trainer.compute_loss(
        moh_model, {"input_ids": ids, "labels": ids}, return_outputs=True, num_items_in_batch=items
    )
    with torch.no_grad():
        teacher_logits = dense(ids).logits
    here, total = 10, items or 10
    next_token = F.cross_entropy(
        outputs.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum", label_smoothing=smoothing
    )
    kl = _definition(outputs.logits, teacher_logits, ids, 2.0)
    expected = ((1 - weight) * next_token + weight * kl + 0.1 * outputs.aux_loss * here) / total
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    weights = [p for name, p in moh_model.named_parameters() if "self_attn" in name]  # the balance loss counts once
    found, right = (torch.autograd.grad(of, weights, retain_graph=True, allow_unused=True) for of in (loss, expected))
    for mine, theirs in zip(found, right, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
    assert not any(p.requires_grad for p in dense.parameters())


@pytest.mark.parametrize("kind", ["dense", "moh"])
def test_labels_are_smoothed_as_torch_does_it_and_ignored_ones_do_not_count(kind, request, tmp_path) -> None:
    model = request.getfixturevalue("dense" if kind == "dense" else "moh_model").train()
    trainer = _trainer(model, tmp_path, {"label_smoothing_factor": 0.3})
    ids = torch.randint(20, (2, 6))
    labels = ids.clone()
    labels[0, 2] = labels[1, 5] = -100
    loss, outputs = trainer.compute_loss(model, {"input_ids": ids, "labels": labels}, return_outputs=True)
    logits = outputs.logits[:, :-1].flatten(0, 1)
    expected = F.cross_entropy(logits, labels[:, 1:].flatten(), label_smoothing=0.3)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    weight = model.get_output_embeddings().weight
    mine, right = (torch.autograd.grad(of, weight, retain_graph=True)[0] for of in (loss, expected))
    torch.testing.assert_close(mine, right)


def test_a_run_with_a_teacher_and_smoothed_labels_ends(dense, moh_model, tmp_path) -> None:
    extra = {"label_smoothing_factor": 0.1}
    assert _trainer(moh_model, tmp_path, extra, teacher=dense).train().global_step == 2


def test_liger_kernels_which_give_no_logits_are_refused_where_they_are_needed(
    dense, moh_model, tmp_path, monkeypatch
) -> None:
    init = MoHTrainer.__mro__[1].__init__

    def with_liger(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.args.use_liger_kernel = True  # without the package transformers refuses it

    monkeypatch.setattr(MoHTrainer.__mro__[1], "__init__", with_liger)
    for options in (dict(teacher=dense), dict(extra={"label_smoothing_factor": 0.1})):
        with pytest.raises(ValueError, match="use_liger_kernel must be False with distillation or label_smoothing"):
            _trainer(moh_model, tmp_path, **options)


def test_evaluation_loss_is_the_next_token_loss_alone(dense, moh_model, tmp_path) -> None:
    trainer = _trainer(moh_model, tmp_path, teacher=dense, distillation_weight=1.0)
    ids = torch.randint(20, (2, 6))
    with torch.no_grad():
        loss = trainer.compute_loss(moh_model.eval(), {"input_ids": ids, "labels": ids})
        assert loss.item() == pytest.approx(moh_model(ids, labels=ids).loss.item())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"distillation_weight": 1.5}, "distillation_weight must be between 0 and 1, got 1.5"),
        ({"distillation_temperature": 0.0}, "distillation_temperature must be above 0, got 0.0"),
    ],
)
def test_wrong_weights_and_temperatures_are_refused(dense, tmp_path, arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        _trainer(dense, tmp_path, **arguments)
