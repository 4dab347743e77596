"""Promises of our models in vLLM, on the CPU: its greedy tokens are those of `generate`. Run by `make test-engines`.

vLLM changes the classes of the models that it builds, so what is expected is computed before.
"""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Any, NamedTuple

os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}

import pytest
import torch

import moh.models.transformers
from engines_on_cpu import needs

needs("vllm", ["vllm"])
import vllm  # noqa: E402

pytestmark = pytest.mark.slow
PROMPTS = [[3, 4, 5, 6, 7, 8], [9, 10, 11], [12, 5, 7, 8, 9, 3, 4, 20, 21] * 4]
NEW = 12
TINY = dict(
    vocab_size=64,
    hidden_size=128,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
    shared_heads=1,
    active_heads=2,
)
CASES: dict[str, dict[str, Any]] = {
    "linear": {},
    "threshold": dict(router="threshold", thresholds=[[9.0, 0.5, 0.0, -9.0]] * 2),
    "two_stage": dict(router="two_stage"),
    "query_norm": dict(router="query_norm"),
    "group_balanced": dict(routing_unit="group_balanced", shared_heads=2),
    "heads-per-layer": dict(shared_heads=[[1, 3], 0], active_heads=[1, 3]),
    "with-a-balance-loss": dict(router_aux_loss_coef=0.01, output_router_logits=True),
    "output-changes": dict(output_changes=dict(heads=[2, 3], rank=2, used_heads=[3, 3])),
    "sliding-window": dict(family="Mistral", sliding_window=8),
    **{
        name: dict(family=name)
        for name in "Qwen2 Qwen3 Gemma Gemma2 Phi Phi3 Olmo2 Granite Cohere Cohere2 Starcoder2".split()
    },
}


class Case(NamedTuple):
    path: Path
    expected: list[list[int]]


def make(folder: Path, family: str = "Llama", **options: Any) -> Case:
    """A tiny random model, saved, and the tokens that `generate` gives."""
    torch.manual_seed(0)
    config = getattr(moh.models.transformers, f"MoH{family}Config")(**TINY | dict(router="linear") | options)
    name = next(f for f in moh.models.transformers.FAMILIES if f.config == f"{family}Config").models
    model = getattr(moh.models.transformers, f"MoH{name['AutoModelForCausalLM']}")(config).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.5 if "router" in parameter_name else 0.2)
    model.save_pretrained(folder)
    model.set_attn_implementation("moh_reference")  # the definition, and no kernels have to be compiled
    model.generation_config.eos_token_id = None
    options = dict(max_new_tokens=NEW, do_sample=False, pad_token_id=0)
    return Case(folder, [model.generate(torch.tensor([p]), **options)[0, len(p) :].tolist() for p in PROMPTS])


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    return {name: make(tmp_path_factory.mktemp(name), **options) for name, options in CASES.items()}


def tokens_of_vllm(path: Path, **options: Any) -> list[list[int]]:
    settings = dict(dtype="float32", enforce_eager=True, max_model_len=96, max_num_seqs=4, skip_tokenizer_init=True)
    engine = vllm.LLM(str(path), **settings | options)
    sampling = vllm.SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, detokenize=False)
    try:
        outputs = engine.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS], sampling, use_tqdm=False)
    finally:
        del engine
        gc.collect()
    return [list(output.outputs[0].token_ids) for output in outputs]


@pytest.mark.parametrize("name", CASES)
def test_greedy_tokens_are_those_of_generate(cases: dict[str, Case], name: str) -> None:
    assert tokens_of_vllm(cases[name].path) == cases[name].expected


@pytest.mark.parametrize("name", ["linear", "two_stage", "threshold", "group_balanced", "heads-per-layer"])
def test_heads_are_split_over_two_processes(cases: dict[str, Case], monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # the test's machine may have a single core to bind to
    split = dict(tensor_parallel_size=2, distributed_executor_backend="mp")
    assert tokens_of_vllm(cases[name].path, **split) == cases[name].expected
