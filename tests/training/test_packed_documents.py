"""Documents in a packed block do not see each other, in dense and MoH models, with every attention backend."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import moh.attention
from moh.data.text.blocks import IGNORED, packed_block

LENGTHS = [(5, 1, 7, 3), (16,), (1, 1, 14), (8, 8)]
IDS = ["_".join(map(str, lengths)) for lengths in LENGTHS]


def _block(lengths: tuple[int, ...], *, cut: bool = False):
    ids = np.random.default_rng(0).integers(3, 20, sum(lengths)).astype(np.uint16)
    starts = np.cumsum([0, *lengths[:-1]])
    return packed_block(ids, starts[1:] if cut else starts)


def test_positions_restart_and_the_first_token_of_a_document_is_not_predicted() -> None:
    block = _block((3, 1, 2))
    assert block["position_ids"].tolist() == [0, 1, 2, 0, 0, 1]
    ids = block["input_ids"].tolist()
    assert block["labels"].tolist() == [IGNORED, ids[1], ids[2], IGNORED, IGNORED, ids[5]]
    assert all(tensor.dtype == torch.long for tensor in block.values())


def test_a_block_that_begins_within_a_document_goes_on_from_0() -> None:
    block = _block((3, 2), cut=True)
    assert block["position_ids"].tolist() == [0, 1, 2, 0, 1]
    assert (block["labels"] == IGNORED).nonzero().flatten().tolist() == [3]


def _logits(model, **inputs):
    with torch.no_grad():
        return model.eval()(**inputs, use_cache=False)


# CPU backends for any gates
BACKENDS = [b.name for b in moh.attention.BACKENDS.values() if b.chosen_on is None and b.name != "grouped"]


@pytest.mark.parametrize("lengths", LENGTHS, ids=IDS)
@pytest.mark.parametrize("backend", ["dense", *BACKENDS])
def test_a_packed_document_has_the_logits_it_has_alone(dense, moh_model, backend: str, lengths) -> None:
    if backend == "dense":
        model = dense
    else:
        model = moh_model
        model.set_attn_implementation(f"moh_{backend}")
    block = _block(lengths)
    other = _block(tuple(reversed(lengths)))  # documents start at different places in the rows of a batch
    batch = {name: torch.stack([block[name], other[name]]) for name in block}
    packed = _logits(model, **batch).logits
    for row in range(2):
        starts = (batch["position_ids"][row] == 0).nonzero().flatten().tolist()
        for start, end in zip(starts, [*starts[1:], sum(lengths)], strict=True):
            alone = _logits(model, input_ids=batch["input_ids"][row : row + 1, start:end]).logits
            assert torch.allclose(packed[row, start:end], alone[0], atol=1e-5)


def test_the_loss_is_that_of_the_documents_alone(moh_model) -> None:
    block = {name: tensor[None] for name, tensor in _block((5, 4, 7)).items()}
    packed = _logits(moh_model, **block).loss
    pieces = [block["input_ids"][:, a:b] for a, b in ((0, 5), (5, 9), (9, 16))]
    sums = [_logits(moh_model, input_ids=piece, labels=piece).loss * (piece.shape[1] - 1) for piece in pieces]
    assert packed.item() == pytest.approx(sum(sums).item() / 13, abs=1e-6)


def test_gradients_do_not_cross_documents(moh_model) -> None:
    block = {name: tensor[None] for name, tensor in _block((6, 10)).items()}
    embedded = moh_model.get_input_embeddings()(block["input_ids"]).detach().requires_grad_()
    out = moh_model(inputs_embeds=embedded, position_ids=block["position_ids"], use_cache=False).logits
    out[0, 6:].square().sum().backward()
    assert embedded.grad[0, :6].abs().max() == 0
    assert embedded.grad[0, 6:].abs().min() > 0


def test_a_sliding_window_stays_within_the_document(dense) -> None:
    from moh import convert

    model = convert(dense, shared_heads=1, active_heads=2, router="query_norm")
    model.config.sliding_window = 3
    block = {name: tensor[None] for name, tensor in _block((6, 10)).items()}
    alone = _logits(model, input_ids=block["input_ids"][:, 6:]).logits
    assert torch.allclose(_logits(model, input_ids=block["input_ids"], position_ids=block["position_ids"]).logits[:, 6:],
                          alone, atol=1e-5)  # fmt: skip
