"""Promises of the diffusion transformer as a diffusers model: saving, training, precision, compilation, clear errors."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("diffusers", reason="the diffusion extra is not installed")

from dit_cases import assert_close, tiny_inputs, tiny_model

from moh import MoHAttention, record_routing
from moh.models.diffusers import MoHDiTTransformer2DModel, guided_output

KINDS = pytest.mark.parametrize("dense", [False, True], ids=["moh", "dense"])


@KINDS
@torch.no_grad()
def test_a_saved_model_loads_as_it_was(tmp_path, dense):
    model = tiny_model(dense=dense)
    model.save_pretrained(tmp_path)
    loaded = MoHDiTTransformer2DModel.from_pretrained(tmp_path)
    saved, read = ({k: v for k, v in m.config.items() if not k.startswith("_")} for m in (model, loaded))
    assert read == saved
    assert torch.equal(loaded(*tiny_inputs()).sample, model(*tiny_inputs()).sample)
    assert not loaded.training and next(loaded.parameters()).requires_grad


def test_a_dense_model_has_no_router_and_a_routed_one_only_that_more():
    dense, moh = tiny_model(dense=True), tiny_model()
    assert not any(isinstance(module, MoHAttention) or "router" in name for name, module in dense.named_modules())
    assert {name for name in moh.state_dict() if ".router." not in name} == set(dense.state_dict())
    assert dense.share == 1 and moh.share == pytest.approx(10 / 12)
    with record_routing(dense) as routing:
        dense(*tiny_inputs())
    assert len(routing) == 0


@torch.no_grad()
def test_gates_of_one_make_the_dense_model():
    dense = tiny_model(dense=True)
    moh = tiny_model(router="query_norm", shared_heads=2, active_heads=2)
    moh.load_state_dict(dense.state_dict())
    assert_close(moh(*tiny_inputs()).sample, dense(*tiny_inputs()).sample, 2e-6)


@torch.no_grad()
def test_inactive_heads_have_no_influence():
    model = tiny_model(shared_heads=2, active_heads=0, router="query_norm")
    before = model(*tiny_inputs()).sample
    for block in model.transformer_blocks:
        block.attn.q_proj.weight[16:].add_(1)
        block.attn.proj.weight[:, 16:].add_(1)
    assert torch.equal(model(*tiny_inputs()).sample, before)


@torch.no_grad()
def test_a_new_model_predicts_zero_whatever_it_sees():
    model = MoHDiTTransformer2DModel(**dict(num_attention_heads=2, attention_head_dim=8, num_layers=1, sample_size=4))
    assert not model(torch.randn(1, 4, 4, 4), torch.tensor(3), torch.tensor([0])).sample.any()


@torch.no_grad()
def test_images_of_a_batch_do_not_see_each_other_and_a_scalar_time_is_everyones():
    model = tiny_model()
    x, t, y = tiny_inputs()
    whole = model(x, t, y).sample
    for row in range(len(x)):
        assert_close(model(x[row : row + 1], t[row : row + 1], y[row : row + 1]).sample[0], whole[row], 1e-5)
    assert torch.equal(model(x, t[0], y).sample, model(x, t[:1].expand(3), y).sample)
    assert torch.equal(model(x, t, y, return_dict=False)[0], whole)


@torch.no_grad()
def test_patches_come_out_where_they_went_in():
    model = tiny_model(dense=True, num_layers=1, patch_size=4)
    nn.init.zeros_(model.proj_out.weight)
    nn.init.zeros_(model.modulation_out.weight)
    model.proj_out.bias.copy_(torch.arange(4 * 4 * 6))  # row, column, channel of a patch
    sample = model(*tiny_inputs()).sample
    expected = torch.arange(4 * 4 * 6).view(4, 4, 6).permute(2, 0, 1).repeat(1, 2, 2)
    assert torch.equal(sample, expected.float().expand(3, -1, -1, -1))


@KINDS
@torch.no_grad()
def test_bfloat16_follows_float32(dense):
    model = tiny_model(dense=dense)
    expected = model(*tiny_inputs()).sample
    got = copy.deepcopy(model).to(torch.bfloat16)(*tiny_inputs(dtype=torch.bfloat16)).sample
    assert got.dtype == torch.bfloat16
    # A token with nearly tied heads may choose another one; that does not move the mean.
    assert (got.float() - expected).abs().mean() <= 0.03 * expected.abs().mean()


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    with record_routing(model) as routing:
        loss = model(*tiny_inputs()).sample.square().mean()
    recorded = len(routing)
    if recorded:
        loss = loss + 0.01 * routing.balance_loss()
    loss.backward()
    assert len(routing) == recorded  # checkpointing runs layers again, which is not a second pass
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@KINDS
def test_every_parameter_gets_a_gradient_and_checkpointing_does_not_change_it(dense):
    model = tiny_model(dense=dense, num_layers=1, **({} if dense else dict(shared_heads=1, active_heads=2)))
    expected = gradients(model)
    assert all(gradient.any() for gradient in expected.values())
    again = copy.deepcopy(model)
    again.zero_grad()
    again.enable_gradient_checkpointing()
    for name, gradient in gradients(again).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-6)


def test_autocast_trains_in_bfloat16():
    model = tiny_model().train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(*tiny_inputs()).sample.float().square().mean()
    loss.backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


def test_labels_are_dropped_at_the_given_rate_in_training_alone():
    model = tiny_model(num_classes=7, class_dropout_prob=0.25)
    seen: list[torch.Tensor] = []
    model.class_embedder.register_forward_hook(lambda _, args, out: seen.append(args[0]))
    x = torch.zeros(1, 3, 8, 8).expand(400, -1, -1, -1)
    labels = torch.arange(400) % 7
    with torch.no_grad():
        model(x, torch.tensor(1), labels)
        model.train()
        model(x, torch.tensor(1), labels)
    assert torch.equal(seen[0], labels)
    dropped = seen[1] == 7
    assert torch.equal(seen[1][~dropped], labels[~dropped])
    assert 0.15 < dropped.float().mean() < 0.35


@KINDS
def test_it_is_captured_as_one_graph_that_gives_the_same_and_can_train(dense):
    model = tiny_model(dense=dense, num_layers=1, **({} if dense else dict(shared_heads=1, active_heads=2)))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    got = compiled(*tiny_inputs()).sample
    assert_close(got, model(*tiny_inputs()).sample, 1e-5)
    got.square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.slow
@KINDS
def test_inductor_compiles_it_as_one_graph(dense):
    model = tiny_model(dense=dense, num_layers=1, **({} if dense else dict(shared_heads=1, active_heads=2)))
    expected = gradients(model)
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        assert_close(compiled(*tiny_inputs()).sample, model(*tiny_inputs()).sample, 1e-5)
    for name, gradient in gradients(compiled).items():
        torch.testing.assert_close(gradient, expected[name.removeprefix("_orig_mod.")], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("guidance", [0, 0.5, 1, 4])
@torch.no_grad()
def test_guidance_moves_from_the_unconditional_to_the_conditional_noise_and_beyond(guidance):
    model = tiny_model()
    x, t, y = tiny_inputs()
    conditional = model(x, t, y).sample
    unconditional = model(x, t, torch.full_like(y, 5)).sample
    got = guided_output(model, x, t, y, guidance=guidance, null_class=5)
    noise = unconditional[:, :3] + guidance * (conditional[:, :3] - unconditional[:, :3])
    assert_close(got, torch.cat([noise, conditional[:, 3:]], dim=1))
    one = guided_output(model, x, t, y, guidance=guidance, null_class=5, guided_channels=1)
    assert_close(one, torch.cat([noise[:, :1], conditional[:, 1:]], dim=1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(guidance=-0.5), "guidance must be at least 0, got -0.5"),
        (dict(guidance=float("nan")), "guidance must be at least 0, got nan"),
        (dict(guidance=2, guided_channels=4), "guided_channels must be between 1 and 3, got 4"),
    ],
    ids=["negative", "nan", "channels"],
)
def test_wrong_guidance_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        guided_output(tiny_model(), *tiny_inputs(), null_class=5, **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda x, t, y: (x, t, y + 1),
            r"class_labels must be from 0 to num_classes - 1 = 4, or 5 for no class, got 6",
        ),
        (lambda x, t, y: (x, t, y - 1), r"class_labels .* got -1"),
        (lambda x, t, y: (x, t, y[:2]), r"class_labels must have shape \[B = 3\], got \[2\]"),
        (lambda x, t, y: (x, t[:2], y), r"timestep must be a scalar or have shape \[B = 3\], got \[2\]"),
        (lambda x, t, y: (x[:, :1], t, y), r"in_channels = 3, .* got \[3, 1, 8, 8\]"),
        (lambda x, t, y: (x[..., :7], t, y), r"sample_size = 8, 8\], got \[3, 3, 8, 7\]"),
        (lambda x, t, y: (x[0], t, y), r"hidden_states must have shape"),
    ],
    ids="id-too-high id-negative few-labels few-times channels size rank".split(),
)
def test_inputs_that_do_not_fit_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        tiny_model()(*change(*tiny_inputs()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(patch_size=3), "sample_size must be a multiple of patch_size = 3, got 8"),
        (dict(hidden_size=30), "hidden_size must be a multiple of 4"),
        (dict(out_channels=4), r"out_channels must be in_channels = 3 \(noise\) or 6"),
        (dict(num_layers=0), "num_layers must be at least 1, got 0"),
        (dict(num_classes=0), "num_classes must be at least 1, got 0"),
        (dict(class_dropout_prob=1.0), "class_dropout_prob must be at least 0 and below 1"),
        (dict(shared_heads=None), "shared_heads and active_heads must both be given"),
        (dict(active_heads=[0, 2]), r"active_heads must be .* one entry per layer \(3\), got 2 entries"),
        (dict(active_heads=[0, 2, 3]), "layer 2: active_heads must be between 0 and"),
        (dict(num_attention_heads=[4, 4, 4]), "hidden_size must be given when num_attention_heads is a list"),
        (
            dict(num_attention_heads=0, hidden_size=32, shared_heads=None, active_heads=None),
            "num_heads must be .* got 0",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_sizes_that_do_not_fit_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        tiny_model(**options)


def test_a_model_of_noise_alone_has_as_many_channels_out_as_in():
    model = tiny_model(out_channels=3)
    assert model.config.out_channels == 3
    assert model(*tiny_inputs()).sample.shape == (3, 3, 8, 8)
    assert tiny_model(in_channels=1).config.out_channels == 2
