"""Promises of the load-balance loss as MoE models of transformers have it: it reaches every training loop, once."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import moh.models.transformers
from moh import loss_scale, record_routing

every_router = pytest.mark.parametrize("router", ["two_stage", "query_norm", "linear"])


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return grads


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def next_token_loss(logits: Tensor, labels: Tensor, **kwargs: Any) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), **kwargs)


@pytest.mark.parametrize("asked", ["argument", "configuration"])
@torch.no_grad()
def test_router_logits_and_the_balance_loss_are_given_when_asked_for(tiny_model, tokens, asked):
    model = tiny_model(shared_heads=[1, [0, 2], 4], active_heads=[2, 1, 0], num_hidden_layers=3, router="linear")
    model.config.output_router_logits = asked == "configuration"
    argument = dict(output_router_logits=True) if asked == "argument" else {}
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    for part in (model, model.model):
        with record_routing(model) as routing:
            out = part(tokens, attention_mask=mask, **argument)
        assert out.aux_loss == routing.balance_loss(mask)
        routed = [info.probs for _, info in routing if info.probs is not None]
        assert [x.shape for x in out.router_logits] == [(24, 3), (24, 3)] and model.config.num_experts == 3
        for logits, probs in zip(out.router_logits, routed, strict=True):
            torch.testing.assert_close(logits.softmax(-1)[:, : probs.shape[-1]], probs.flatten(0, 1))
        assert not hasattr(part(tokens, output_router_logits=False), "aux_loss")
    labelled = model(tokens, labels=tokens, **argument)
    assert labelled.loss == model(tokens, labels=tokens, output_router_logits=False).loss  # the coefficient is 0


@every_router
def test_a_plain_loop_trains_the_balance_as_the_models_own_loss_does(tiny_model, tokens, router):
    model = tiny_model(router=router, router_aux_loss_coef=0.3).train()
    expected = gradients(model, model(tokens, labels=tokens).loss)
    out = model(tokens)
    assert not hasattr(out, "aux_loss")
    assert_same(gradients(model, next_token_loss(out.logits, tokens)), expected)
    logits = model.lm_head(model.model(tokens)[0])  # nor does it need the head's forward
    assert_same(gradients(model, next_token_loss(logits, tokens)), expected)
    ignored = model(tokens, labels=tokens)  # its own loss
    assert_same(gradients(model, next_token_loss(ignored.logits, tokens)), expected)


def test_logits_may_be_changed_in_place(tiny_model, tokens):
    model = tiny_model(router_aux_loss_coef=0.3).train()
    for call in (dict(), dict(labels=tokens)):
        logits = model(tokens, **call).logits
        logits /= 2
        assert_same(
            gradients(model, next_token_loss(logits, tokens)),
            gradients(model, next_token_loss(model(tokens).logits / 2, tokens)),
        )


def test_a_loop_that_adds_the_balance_loss_itself_gets_no_second_one(tiny_model, tokens):
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    model = tiny_model(shared_heads=[1, 1], active_heads=[2, 1], router="two_stage", router_aux_loss_coef=0.3).train()
    expected = gradients(model, model(tokens, labels=tokens).loss)
    out = model(tokens, output_router_logits=True)
    assert_same(gradients(model, 8 * (next_token_loss(out.logits, tokens) + 0.3 * out.aux_loss)), {
        name: 8 * gradient for name, gradient in expected.items()
    })  # fmt: skip
    runs = []
    for coefficient in (0.3, 0.0):  # by transformers' own formula
        model.config.router_aux_loss_coef = coefficient
        out = model(tokens, output_router_logits=True)
        formula = load_balancing_loss_func(
            out.router_logits, model.config.num_experts, model.config.num_experts_per_tok
        )
        assert 1 < formula < 3
        runs.append(gradients(model, next_token_loss(out.logits, tokens) + formula))
    assert_same(*runs)


def test_without_a_coefficient_in_evaluation_or_without_gradients_nothing_is_added(tiny_model, tokens):
    model = tiny_model(router="two_stage")
    expected = gradients(model, next_token_loss(model(tokens).logits, tokens))
    model.config.router_aux_loss_coef = 0.3
    assert_same(gradients(model, next_token_loss(model(tokens).logits, tokens)), expected)  # it is not in training
    model.train()
    with torch.no_grad():
        assert "Attached" not in str(model(tokens).logits.grad_fn)


def test_a_loss_divided_by_the_labels_of_a_step_gets_the_calls_share(tiny_model):
    """As the Trainer's label smoothing, `compute_loss_func` and TRL divide it; padding and prompts are no labels."""
    model = tiny_model(router="two_stage", router_aux_loss_coef=0.3).train()
    ids = torch.randint(3, 64, (4, 12), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[2:, :8] = -100
    items = (labels[:, 1:] != -100).sum()
    expected, got = [], []
    for rows in (slice(0, 2), slice(2, 4)):
        call = dict(input_ids=ids[rows], num_items_in_batch=items)
        expected.append(gradients(model, model(**call, labels=labels[rows]).loss))
        loss = next_token_loss(model(**call).logits, labels[rows], reduction="sum") / items
        got.append(gradients(model, loss))
    for a, b in zip(got, expected, strict=True):
        assert_same(a, b)


def test_float16_needs_the_scale_of_a_loss_that_is_not_the_models_own(tiny_model, tokens):
    model = tiny_model(router="two_stage", router_aux_loss_coef=0.3).train()

    def foreign(scale: float | None) -> Tensor:
        with nullcontext() if scale is None else loss_scale(scale), torch.autocast("cpu", torch.float16):
            return next_token_loss(model(tokens).logits.float(), tokens)

    with torch.autocast("cpu", torch.float16):
        expected = gradients(model, 64 * model(tokens, labels=tokens).loss)
    with pytest.raises(RuntimeError, match=r"moh.loss_scale\(scaler.get_scale\(\)\)"):
        foreign(None).backward()
    model.zero_grad()
    got = gradients(model, 64 * foreign(64.0))
    wrong = gradients(model, 64 * foreign(1.0))
    for name in (n for n in expected if "router" in n):
        assert (got[name] - expected[name]).norm() < 0.02 * expected[name].norm()
    assert any((wrong[n] - expected[n]).norm() > 0.1 * expected[n].norm() for n in expected if "router" in n)


def test_gradient_checkpointing_and_compiling_change_nothing(tiny_model, tokens):
    model = tiny_model(router="two_stage", router_aux_loss_coef=0.3).train()
    expected = gradients(model, model(tokens, labels=tokens).loss)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for call in (dict(), dict(labels=tokens), dict(output_router_logits=True)):
        logits = compiled(tokens, use_cache=False, **call).logits
        assert_same(gradients(model, next_token_loss(logits, tokens)), expected)
    assert_same(gradients(model, compiled(tokens, labels=tokens, use_cache=False).loss), expected)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_same(gradients(model, next_token_loss(model(tokens).logits, tokens)), expected)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(RuntimeError, match="use_reentrant"):
        model(tokens)


SMOOTHED = """
{first}
{second}
import sys, torch
from transformers import Trainer, TrainingArguments
from moh.models.transformers import MoHLlamaConfig, MoHLlamaForCausalLM
torch.manual_seed(0)
sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
heads = dict(shared_heads=1, active_heads=2, router_aux_loss_coef=float(sys.argv[2]))
model = MoHLlamaForCausalLM(MoHLlamaConfig(**sizes, **heads)).train()
ids = torch.randint(3, 64, (2, 12))
trainer = Trainer(model, TrainingArguments(sys.argv[1], label_smoothing_factor=0.1, use_cpu=True, report_to=[]))
loss = trainer.compute_loss(model, dict(input_ids=ids, labels=ids), num_items_in_batch=torch.tensor(22))
expected = torch.nn.functional.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), label_smoothing=0.1)
assert torch.allclose(loss, expected), (loss, expected)
loss.backward()
router = model.model.layers[0].self_attn.router.routed.weight
print("gradient", router.grad.norm().item())
"""


@pytest.mark.parametrize("first", ["transformers", "moh"])
def test_the_trainers_label_smoothing_shifts_labels_and_balances(forks, first, tmp_path):
    imports = dict(transformers="from transformers.models.auto import modeling_auto", moh="import moh")
    second = next(text for name, text in imports.items() if name != first)
    code = SMOOTHED.format(first=imports[first], second=second)
    found = []
    for coefficient in ("0", "0.5"):
        run = forks.run(code, tmp_path, coefficient)
        assert run.returncode == 0, run.stderr[-2000:]
        found.append(float(run.stdout.split("gradient")[1]))
    assert abs(found[1] - found[0]) > 1e-4


@pytest.mark.parametrize("family, auto", [("ViT", "ForImageClassification"), ("Bert", "ForSequenceClassification")])
def test_encoders_balance_in_a_plain_loop_too(tokens, family, auto):
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
    sizes |= dict(image_size=16, patch_size=4) if family == "ViT" else dict(vocab_size=64, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, num_labels=3)  # fmt: skip
    config = getattr(moh.models.transformers, f"MoH{family}Config")(
        **sizes, shared_heads=1, active_heads=1, router_aux_loss_coef=0.3
    )
    model = getattr(moh.models.transformers, f"MoH{family}{auto}")(config).train()
    inputs = dict(pixel_values=torch.randn(2, 3, 16, 16)) if family == "ViT" else dict(input_ids=tokens)
    labels = torch.tensor([0, 1])
    expected = gradients(model, model(**inputs, labels=labels).loss)
    assert_same(gradients(model, F.cross_entropy(model(**inputs).logits, labels)), expected)


def test_question_answering_has_the_balance_loss_too(tokens):
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=64)
    config = moh.models.transformers.MoHBertConfig(**sizes, shared_heads=1, active_heads=1, router_aux_loss_coef=0.3)
    model = moh.models.transformers.MoHBertForQuestionAnswering(config).eval()
    spans = dict(start_positions=torch.tensor([1, 2]), end_positions=torch.tensor([3, 4]))
    out = model(tokens, **spans)
    model.config.router_aux_loss_coef = 0.0
    torch.testing.assert_close(out.loss, model(tokens, **spans).loss + 0.3 * out.aux_loss)
