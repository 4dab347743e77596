"""Promises of training: every router learns, the balance loss is added on request, wrappers do not break it."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from moh import record_routing

every_router = pytest.mark.parametrize("router", ["two_stage", "query_norm", "linear"])


def gradients(model) -> dict[str, torch.Tensor]:
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return grads


def assert_same(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@every_router
def test_loss_falls_and_the_router_learns(tiny_model, tokens, router):
    model = tiny_model(router=router, shared_heads=[2, [0]], active_heads=1, router_aux_loss_coef=0.01).train()
    routers = {name: p.detach().clone() for name, p in model.named_parameters() if "router" in name}
    assert bool(routers) == (router != "query_norm")
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(15):
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5
    for name, before in routers.items():
        assert not torch.equal(model.get_parameter(name), before), name


def test_freshly_made_model_trains(tiny_config, tokens):
    from moh.models.transformers import MoHLlamaForCausalLM

    model = MoHLlamaForCausalLM(tiny_config(shared_heads=2, active_heads=1, router_aux_loss_coef=0.01))
    loss = model(tokens, labels=tokens).loss
    loss.backward()
    assert loss.item() == pytest.approx(4.16, abs=0.3)  # log(64), and 0.01 of about 1
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@every_router
def test_balance_loss_is_added_with_its_weight(tiny_model, tokens, router):
    model = tiny_model(router=router)
    plain = model(tokens, labels=tokens)
    assert not hasattr(plain, "aux_loss")
    model.config.router_aux_loss_coef = 0.3
    with record_routing(model) as routing:
        got = model(tokens, labels=tokens)
    assert got.aux_loss.item() == pytest.approx(routing.balance_loss().item())
    assert got.loss.item() == pytest.approx(plain.loss.item() + 0.3 * got.aux_loss.item(), rel=1e-6)
    assert torch.equal(got.logits, plain.logits)
    without_labels = model(tokens)
    assert without_labels.loss is None


def test_padding_does_not_count_in_the_balance_loss(tiny_model, tokens):
    model = tiny_model(router_aux_loss_coef=0.3)
    mask = torch.ones_like(tokens)
    mask[0, 7:] = 0
    labels = tokens.masked_fill(mask == 0, -100)
    with record_routing(model) as routing:
        got = model(tokens, attention_mask=mask, labels=labels)
    assert got.aux_loss.item() == pytest.approx(routing.balance_loss(mask).item())
    assert got.aux_loss.item() != pytest.approx(routing.balance_loss().item(), rel=1e-4)


@every_router
def test_balance_loss_reaches_the_weights(tiny_model, tokens, router):
    model = tiny_model(router=router, router_aux_loss_coef=0.3)
    model(tokens, labels=tokens).aux_loss.backward()
    part = "q_proj" if router == "query_norm" else "router"
    assert all(p.grad.abs().sum() > 0 for n, p in model.named_parameters() if part in n and "stage" not in n)


def test_accumulated_calls_add_up_to_one_step(tiny_model):
    """The Trainer passes `num_items_in_batch` and sums the losses of an optimiser step's calls."""
    model = tiny_model(router_aux_loss_coef=0.3)
    batches = [torch.randint(3, 64, (2, 12)), torch.randint(3, 64, (2, 12))]
    labels = [batches[0], batches[1].clone()]
    labels[1][:, :8] = -100  # fewer labels weigh less
    counts = [(label[:, 1:] != -100).sum() for label in labels]
    items = sum(counts)
    assert counts[0] != counts[1]
    outputs = [
        model(batch, labels=label, num_items_in_batch=items) for batch, label in zip(batches, labels, strict=True)
    ]
    got = sum(out.loss for out in outputs)
    task = sum(
        F.cross_entropy(out.logits[:, :-1].flatten(0, 1), label[:, 1:].flatten(), reduction="sum")
        for out, label in zip(outputs, labels, strict=True)
    )
    balance = sum(out.aux_loss * count for out, count in zip(outputs, counts, strict=True)) / items
    torch.testing.assert_close(got, task / items + 0.3 * balance)


@pytest.mark.parametrize("coefficient", [0.0, 0.3])
@every_router
def test_gradient_checkpointing_gives_the_same_gradients(tiny_model, tokens, router, coefficient):
    model = tiny_model(router=router, router_aux_loss_coef=coefficient).train()
    model(tokens, labels=tokens).loss.backward()
    expected = gradients(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with record_routing(model) as routing:
        out = model(tokens, labels=tokens)
        out.loss.backward()
    assert [name for name, _ in routing] == [f"model.layers.{i}.self_attn.router" for i in range(2)]
    assert_same(gradients(model), expected)


def test_compiled_model_is_one_graph_and_gives_the_same_gradients(tiny_model, tokens):
    torch.compiler.reset()
    model = tiny_model(router_aux_loss_coef=0.3)
    expected_loss = model(tokens, labels=tokens, use_cache=False).loss
    expected_loss.backward()
    expected = gradients(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    got = compiled(tokens, labels=tokens, use_cache=False)
    torch.testing.assert_close(got.loss, expected_loss)
    got.loss.backward()
    assert_same(gradients(model), expected)


def test_autocast_trains_in_bfloat16(tiny_model, tokens):
    model = tiny_model(router_aux_loss_coef=0.3).train()
    exact = model(tokens, labels=tokens).loss.item()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(tokens, labels=tokens)
    out.loss.backward()
    assert out.loss.dtype == torch.float32
    assert out.loss.item() == pytest.approx(exact, rel=0.05)
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


def test_attention_dropout_only_in_training(tiny_model, tokens):
    model = tiny_model(attention_dropout=0.5)
    assert torch.equal(model(tokens).logits, model(tokens).logits)
    model.train()
    assert not torch.equal(model(tokens).logits, model(tokens).logits)


def test_tuple_output_holds_what_the_named_one_holds(tiny_model, tokens):
    model = tiny_model(router_aux_loss_coef=0.3)
    named = model(tokens, labels=tokens)
    loss, *rest = model(tokens, labels=tokens, return_dict=False)
    assert loss.item() == named.loss.item()
    assert any(isinstance(item, torch.Tensor) and torch.equal(item, named.logits) for item in rest)


@pytest.mark.parametrize("coefficient", [0.0, 0.3])
def test_hidden_states_are_given_when_asked_for(tiny_model, tokens, coefficient):
    out = tiny_model(router_aux_loss_coef=coefficient)(tokens, labels=tokens, output_hidden_states=True)
    assert len(out.hidden_states) == 3
    assert all(h.shape == (2, 12, 32) for h in out.hidden_states)


@pytest.mark.parametrize("keep", [1, 5])
def test_logits_to_keep_and_embeddings_as_input(tiny_model, tokens, keep):
    for options in ({}, dict(family="Mistral", sliding_window=4)):
        model = tiny_model(**options)
        full = model(tokens).logits
        embeddings = model.get_input_embeddings()(tokens)
        got = model(inputs_embeds=embeddings, logits_to_keep=keep).logits
        torch.testing.assert_close(got, full[:, -keep:])


@every_router
def test_lora_trains_and_merges(tiny_model, tokens, router):
    peft = pytest.importorskip("peft")
    model = tiny_model(router=router, router_aux_loss_coef=0.3)
    before = model(tokens).logits
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=True)
    adapted = peft.get_peft_model(model, lora)
    torch.testing.assert_close(adapted(input_ids=tokens).logits, before)
    out = adapted(input_ids=tokens, labels=tokens)
    assert out.aux_loss is not None
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.5)
    out.loss.backward()
    trained = {name for name, p in adapted.named_parameters() if p.grad is not None}
    assert trained and all("lora_" in name for name in trained)
    optimizer.step()
    adapted.eval()
    after = adapted(input_ids=tokens).logits
    assert not torch.allclose(after, before)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged(tokens).logits, after, rtol=1e-4, atol=1e-4)


def test_reentrant_checkpointing_is_refused_where_it_would_lose_the_balance_loss(tiny_model, tokens):
    model = tiny_model(router="two_stage", router_aux_loss_coef=0.01).train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(RuntimeError, match="use_reentrant"):
        model(input_ids=tokens, labels=tokens)
