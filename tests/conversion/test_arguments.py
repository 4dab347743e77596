"""Promise: calibration takes any form; what can't be converted is refused with a reason and stays unchanged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, StableLmConfig, StableLmForCausalLM

from moh import convert
from moh.conversion.calibrator import Calibrator
from moh.conversion.passes import collect_heads
from moh.conversion.transformers import DenseTextModel
from moh.data.text.blocks import calibration_blocks

HEADS = dict(shared_heads=1, active_heads=1)


def states_equal(a, b) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def texts(text_file: Path) -> list[str]:
    return text_file.read_text(encoding="utf-8").split("\n\n")


@pytest.mark.parametrize("router", ["linear", "two_stage"])
def test_texts_id_lists_and_tensors_give_the_same_model(base_dir: Path, texts, router) -> None:
    dense, tokenizer = AutoModelForCausalLM.from_pretrained(base_dir), AutoTokenizer.from_pretrained(base_dir)
    options = dict(**HEADS, router=router, seq_len=16)
    ids = [[*tokenizer(text).input_ids, tokenizer.eos_token_id] for text in texts]
    row = torch.tensor([i for text in ids for i in text])
    blocks = row[: len(row) // 16 * 16].view(-1, 16)
    expected = convert(dense, calibration=texts, tokenizer=tokenizer, **options)
    assert states_equal(convert(dense, calibration=ids, **options), expected)
    assert states_equal(convert(dense, calibration=blocks, **options), expected)
    assert states_equal(convert(dense, calibration=blocks.int(), **options), expected)
    assert states_equal(convert(base_dir, calibration=texts, **options), expected)  # finds the tokenizer itself
    assert not states_equal(convert(dense, calibration=blocks[:5], **options), expected)


def test_calibration_blocks_begin_as_the_tokenizer_begins_a_text(bos_tokenizer) -> None:
    texts = ["the head reads .", "a token", "the value of the router"]
    bos, eos, vocabulary = bos_tokenizer.bos_token_id, bos_tokenizer.eos_token_id, len(bos_tokenizer)
    bare = [[*bos_tokenizer(text, add_special_tokens=False).input_ids, eos] for text in texts]
    (blocks,) = calibration_blocks(texts, bos_tokenizer, 100, [4], vocabulary)
    row = [i for ids in bare for i in ids]
    assert blocks.tolist() == [[bos, *row[i : i + 3]] for i in range(0, 12, 3)]
    begun = [[bos, *ids] for ids in bare]
    for sequences, tokenizer in ((bare, bos_tokenizer), (begun, bos_tokenizer), (begun, None)):
        (found,) = calibration_blocks(sequences, tokenizer, 100, [4], vocabulary, bos_token_id=bos)
        assert torch.equal(found, blocks)
    (plain,) = calibration_blocks(
        bare, None, 100, [4], vocabulary, bos_token_id=bos
    )  # nothing says that they begin with it
    assert plain.flatten().tolist() == row[:12]
    assert calibration_blocks(["a token"], bos_tokenizer, 100, [64], vocabulary)[0].tolist() == [[bos, *bare[1]]]


@pytest.mark.parametrize(
    ("lengths", "tokens", "shapes"),
    [
        ([4, 16], 64, [(8, 4), (2, 16)]),  # half of the tokens each
        ([4, 16], 24, [(3, 4), (1, 16)]),  # at least one block of each
        ([4, 8, 16], 96, [(8, 4), (4, 8), (2, 16)]),
        ([4, 1000], 64, [(8, 4), (1, 96)]),  # the text is shorter than a block
        ([100, 1000], 1000, [(1, 96)]),
    ],
    ids=str,
)
def test_blocks_of_several_lengths_share_the_tokens(lengths, tokens, shapes) -> None:
    ids = [list(range(40)), list(range(40, 96))]
    groups = calibration_blocks(ids, None, tokens, lengths, 96)
    assert [tuple(blocks.shape) for blocks in groups] == shapes
    assert all(
        int(blocks[0, 0]) == 0 and int(blocks[-1, -1]) >= 79 for blocks in groups if len(blocks) > 1
    )  # spread out


@torch.no_grad()
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_a_calibration_on_several_lengths_sums_over_all_of_them(make_dense, tokens, batch_size) -> None:
    groups = [tokens[:3].view(6, 8), tokens[3:].flatten()[:72].view(3, 24)]
    dense = DenseTextModel(make_dense(), "linear", copied=False)
    both, short, long = (Calibrator(dense, part, batch_size, progress=False) for part in (groups, *groups))
    sums = [collect_heads(dense, [1], part.playback("heads"))[1].zz for part in (both, short, long)]
    torch.testing.assert_close(sums[0], sums[1] + sums[2], rtol=1e-5, atol=1e-5)
    # what a loss is computed on is short, and what part of the samples is for is of every length
    assert both.some(24).tolist() == groups[0][[0, 2, 5]].tolist()
    chosen = both.playback("heads", both._chosen(48))
    again = [
        collect_heads(dense, [1], part)[1].zz
        for part in (chosen, short.playback("", [0, 2, 5]), long.playback("", [0]))
    ]
    torch.testing.assert_close(again[0], again[1] + again[2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "positions", "tokens", "text", "lengths"),
    [
        ("Llama", 8192, 49_152, 24_576, [512, 4096]),
        ("Llama", 8192, 49_151, 30_000, [512]),  # no room for six long blocks
        ("Llama", 8192, 49_152, 24_575, [512]),  # nor here: the text has too few tokens
        ("Llama", 8192, 49_152, 600, [512]),
        ("Llama", 8192, 49_152, 100, [100]),
        ("Llama", 2048, 49_152, 30_000, [512]),
        ("Llama", 64, 12_288, 30_000, [64]),  # it would run on more, but was never trained on them
        ("OPT", 256, 49_152, 30_000, [256]),
    ],
)
def test_a_model_that_generates_is_calibrated_on_short_and_long_blocks(
    make_dense, family, positions, tokens, text, lengths
) -> None:
    dense = DenseTextModel(make_dense(family, max_position_embeddings=positions), "linear", copied=False)
    groups = dense.samples([[i % 64 for i in range(text)]], max_tokens=tokens, tokenizer=None, seq_len=None)
    assert [blocks.shape[1] for blocks in groups] == lengths
    assert max(blocks.numel() for blocks in groups) <= tokens // len(groups)


def test_calibration_tokens_bound_what_is_looked_at(make_dense, tokens) -> None:
    dense = make_dense()
    few = convert(dense, calibration=tokens, calibration_tokens=3 * 16, **HEADS)
    assert states_equal(few, convert(dense, calibration=tokens[torch.linspace(0, 23, 3).long()], **HEADS))


def test_the_query_norm_router_does_not_look_at_calibration(make_dense, tokens) -> None:
    options = dict(**HEADS, router="query_norm")
    assert states_equal(convert(make_dense(), calibration=tokens, **options), convert(make_dense(), **options))


def test_the_number_of_blocks_per_pass_does_not_matter(make_dense, tokens) -> None:
    one, all_at_once = (
        convert(make_dense(), calibration=tokens, batch_size=n, **HEADS).model.layers[1].self_attn.router.contribution
        for n in (1, 24)
    )
    assert torch.allclose(one.weight, all_at_once.weight, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(calibration=None), "calibration must be given for router='threshold'"),
        (dict(router="two_stage", calibration=None), "calibration must be given for router='two_stage'"),
        (dict(router="best"), "router must be one of .*'best'"),
        (dict(shared_heads=2, active_heads=3), "active_heads must be between 0 and .* = 2, got 3"),
        (dict(shared_heads=5), "shared_heads must be between 0 and num_heads = 4, got 5"),
        (dict(shared_heads=[0, 7]), r"shared_heads must hold indices between 0 and .* = 3, got \[0, 7\]"),
        (dict(active_heads=[1, 1, 1]), r"active_heads must be .* one entry per layer \(2\), got 3 entries"),
        (dict(active_heads=[1, 9]), "active_heads must be between 0 and .* = 3, got 9"),
        (dict(allocation="random"), "allocation must be one of 'even', 'sensitivity', got 'random'"),
        (dict(router="two_stage", allocation="sensitivity"), "need router='linear' or .*'fixed', got router='two_stage'"),
        (dict(router="query_norm", calibration=None, refit_output=True), "'fixed', got router='query_norm'"),
        (dict(shared_heads=[0], allocation="sensitivity"), "shared_heads must be a number for allocation='sensitivity'"),
        (dict(calibration=["a text"]), "tokenizer must be given when calibration is texts"),
        (dict(calibration="a text"), "calibration must be a non-empty list of texts"),
        (dict(calibration=[]), "calibration must be a non-empty list of texts"),
        (dict(calibration=[[1]]), "calibration must hold at least 2 tokens, got 1"),
        (dict(calibration=[[1, 64]]), "token ids from 0 to 63, got 1 to 64: does the tokenizer belong to the model?"),
        (dict(calibration=[[-1, 3]]), "token ids from 0 to 63, got -1 to 3"),
        (dict(calibration=torch.rand(2, 4)), r"integer token ids \[n, N\], got torch.float32 \(2, 4\)"),
        (dict(calibration=torch.arange(4)), r"integer token ids \[n, N\], got torch.int64 \(4,\)"),
        (dict(calibration=torch.ones(3, 0, dtype=torch.long)), r"integer token ids \[n, N\], got torch.int64 \(3, 0\)"),
        (dict(seq_len=1), "seq_len at least 2, got 49152, 1"),
        (dict(seq_len=[64, 1]), "seq_len at least 2, got 49152, 1"),
        (dict(seq_len=[]), "seq_len must be a number of tokens, or several, got none"),
        (dict(calibration_tokens=0), "calibration_tokens must be at least 1 .*, got 0, "),
        (dict(batch_size=0), "batch_size must be at least 1, got 0"),
        (dict(router_aux_loss_coef=-0.1), "router_aux_loss_coef must be at least 0, got -0.1"),
    ],
)  # fmt: skip
def test_an_argument_out_of_range_is_refused_and_nothing_changes(make_dense, tokens, options, message) -> None:
    dense = make_dense().train()
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    settings = dense.config.to_dict()
    with pytest.raises(ValueError, match=message):
        convert(dense, **dict(**HEADS, calibration=tokens) | options)
    assert dense.training and dense.config.to_dict() == settings
    assert all(torch.equal(before[name], tensor) for name, tensor in dense.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in dense.parameters())


def test_a_family_that_is_not_supported_is_named_with_those_that_are() -> None:
    sizes = dict(vocab_size=32, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    model = StableLmForCausalLM(StableLmConfig(**sizes, num_key_value_heads=2))
    with pytest.raises(ValueError, match=r"model must be of a type among llama, mistral, qwen2.*, got 'stablelm'"):
        convert(model, router="query_norm", **HEADS)


def test_a_model_that_normalises_its_queries_is_pointed_to_the_contribution_router(make_dense) -> None:
    with pytest.raises(ValueError, match=r"query_norm.*'qwen3'.*normalises its queries.*router='linear'"):
        convert(make_dense("Qwen3"), router="query_norm", **HEADS)


def test_a_moh_model_is_not_converted_again(make_dense) -> None:
    model = convert(make_dense(), router="query_norm", **HEADS)
    with pytest.raises(ValueError, match="model is a MoH model already"):
        convert(model, router="query_norm", **HEADS)


@pytest.mark.parametrize("first_window_layer", [0, 1, 2], ids=["all_layers", "one_layer", "no_layer"])
@torch.no_grad()
def test_a_window_of_all_layers_or_of_some_or_of_none_is_kept(make_dense, tokens, first_window_layer) -> None:
    options = dict(use_sliding_window=True, sliding_window=5, max_window_layers=first_window_layer)
    dense = make_dense("Qwen2", **options)
    model = convert(dense, router="query_norm", shared_heads=1, active_heads=3)
    assert model.config.layer_types == dense.config.layer_types
    expected = dense(tokens[:2]).logits
    assert (model(tokens[:2]).logits - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_a_path_where_nothing_is_names_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no .*nothing"):
        convert(tmp_path / "nothing", router="query_norm", **HEADS)
    with pytest.raises(ValueError, match=r"existing .gguf file, got .*nothing\.gguf"):
        convert(tmp_path / "nothing.gguf", router="query_norm", **HEADS)
