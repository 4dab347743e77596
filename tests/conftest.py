"""What all tests share: one thread, a fixed seed, no network, a tiny model and text, and teams of processes.

Hypothesis tries few examples, always the same; `HYPOTHESIS_PROFILE=thorough` tries many, new ones on each run.
"""

from __future__ import annotations

import os
import runpy
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # lets the tests import the helpers of this folder
os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported
os.environ.setdefault("MOH_CPU_IMITATE_AMX", "1")  # the AMX kernels too, if they can be built

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "default",
    max_examples=150,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
settings.register_profile("thorough", settings.get_profile("default"), max_examples=2000, derandomize=False)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

torch.set_num_threads(1)

WORDS = "the a head token gate router layer value key query sees skips picks weighs reads and or not of in".split()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How many tests were skipped, and why; a group for each reason."""
    skipped = terminalreporter.stats.get("skipped", [])
    reasons = Counter(report.longrepr[2].removeprefix("Skipped: ") for report in skipped)
    if reasons:
        terminalreporter.section(f"{len(skipped)} skipped")
        for reason, count in reasons.most_common():
            terminalreporter.write_line(f"{count:5}  {' '.join(reason.split())}")


@pytest.fixture(autouse=True)
def _same_numbers_in_every_test() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a two-layer Llama with four heads, two key/value heads and a word tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("base")
    vocabulary = {word: index for index, word in enumerate(["<eos>", "<unk>", ".", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", unk_token="<unk>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        eos_token_id=0,
        bos_token_id=None,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def tokenizer(base_dir: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(base_dir)


@pytest.fixture
def bos_tokenizer(base_dir: Path) -> Any:
    """The word tokenizer, but with a beginning-of-text token that it puts before every text, as Gemma's and Llama's do."""
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base_dir)
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    bos = ("<bos>", tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[bos])
    return tokenizer


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 paragraphs of random sentences in the tokenizer's words."""
    generator = torch.Generator().manual_seed(0)
    file = tmp_path_factory.mktemp("text") / "words.txt"
    indices = torch.randint(len(WORDS), (60, 4, 8), generator=generator).tolist()
    paragraphs = [" ".join(" ".join(WORDS[i] for i in sentence) + " ." for sentence in part) for part in indices]
    file.write_text("\n\n".join(paragraphs), encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def forks() -> Iterator[Any]:
    """`forks.run(code, ...)` runs a program in an interpreter of its own, which has imported no more than `forks.PRELOADED`."""
    from forks import Forks

    made = Forks()
    yield made
    made.close()


@pytest.fixture(scope="session")
def team(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`team(job, size, ...)` runs a function of `distributed/workers.py` on that many processes."""
    Team = runpy.run_path(str(Path(__file__).parent / "distributed" / "team.py"))["Team"]
    return Team(tmp_path_factory.mktemp("team"))
