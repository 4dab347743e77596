"""The demo's steps in order: base model, text, conversion two ways, tuning with a dense control, measurements, report.

Every step is a public function of a lower room; this file only joins and times them.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moh._files import check_replaceable, check_writable, replacing_directory, write_text
from moh.conversion import convert
from moh.data.text.blocks import evenly_spread
from moh.data.text.corpora import DEFAULT_CORPUS
from moh.data.text.files import printable
from moh.demo.base_model import default_base_model
from moh.demo.report import DemoReport, ModelRow, check_report_files, compared
from moh.evaluation import PerplexityResult, cpu_name, measure_speed, perplexity
from moh.inspection import inspect_groups, token_groups
from moh.inspection.plots import plot_head_load, plot_losses, save
from moh.models.card import card_of, layers_of, write_card
from moh.models.transformers.loading import default_device, load_causal_lm, load_tokenizer
from moh.routing import record_routing, router_class
from moh.training import choose_precision, corpus_from_files, load_corpus, pack_tokens, train
from moh.training.language.recipe import ModelRecipe, Recipe, TrainingRecipe

MAX_STEPS = 120
"""Most steps of a run whose number of steps is not given."""

ROUTER = "threshold"
"""The router of the model that is tuned."""

PROMPTS = ("A database index is", "The first thing to do when a server does not answer is")


@dataclass(frozen=True)
class DemoSettings:
    """What the demo does; the defaults are those of `make demo`.

    Args:
        output_dir: where the report, the pictures and the models go.
        base: directory, hub name or .gguf file of a dense model; None fetches SmolLM2-135M.
        corpus: a built-in text (`moh.training.CORPORA`); not used if `files` are given.
        files: text files to use instead.
        shared_heads: heads that every token uses; None means 2 in 9, or 1 in 2 with the paper's router.
        active_heads: routed heads per token, on average; None fills up to 7 in 9.
        steps: optimiser steps of each run; None means as many as fit `minutes`, up to 120.
        minutes: for tuning all runs together, if `steps` is None.
        batch_size: sequences per step.
        seq_len: tokens per sequence.
        learning_rate: peak, with warm-up and cosine decay.
        calibration_tokens: tokens that the conversion reads.
        heldout_tokens: tokens that perplexity is measured on.
        distillation_weight: weight of the dense original's predictions in the MoH model's loss; 0 is next-token loss only.
        full: also tune the model that was converted the paper's way, and convert without touching a weight.
        seed: order of the training text.
    """

    output_dir: str = "moh-demo"
    base: str | None = None
    corpus: str = DEFAULT_CORPUS
    files: tuple[str, ...] = ()
    shared_heads: int | None = None
    active_heads: int | None = None
    steps: int | None = None
    minutes: float = 7.0
    batch_size: int = 2
    seq_len: int = 512
    learning_rate: float = 1e-4
    calibration_tokens: int = 12_288
    heldout_tokens: int = 8_192
    distillation_weight: float = 0.0
    full: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("minutes", "learning_rate"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        for name in ("steps", "batch_size", "calibration_tokens", "heldout_tokens"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.seq_len < 2:
            raise ValueError(f"seq_len must be at least 2, got {self.seq_len}")
        if not 0 <= self.distillation_weight <= 1:
            raise ValueError(f"distillation_weight must be between 0 and 1, got {self.distillation_weight}")


def run_demo(settings: DemoSettings, *, show: bool = True) -> DemoReport:
    """Run the demo; the report is returned and written to `output_dir` with the pictures and the model.

    Args:
        settings: what the demo does.
        show: print the report, on standard output.

    Raises:
        ValueError: a setting is out of range, or the model or the text can't be used.
        RuntimeError: the model or the text can't be fetched.
    """
    demo = _Demo(settings)
    report = demo.run()
    if show:
        demo.show(report)
    return report


class _Demo:
    def __init__(self, settings: DemoSettings) -> None:
        self.settings = settings
        self.output_dir = Path(settings.output_dir)
        check_writable(self.output_dir, name="output_dir")
        check_replaceable(self.output_dir / "model", name="output_dir: its")
        check_report_files(self.output_dir)
        self.output_dir.mkdir(parents=True, exist_ok=True)
        self.console = Console(stderr=True)
        self.seconds: dict[str, float] = {}
        self.rows: list[ModelRow] = []
        self.losses: dict[str, list[tuple[int, float]]] = {}

    def run(self) -> DemoReport:
        s = self.settings
        with self._step("loading the model and the text"):
            base = s.base if s.base is not None else str(default_base_model())
            dense = load_causal_lm(base, dtype=torch.float32, device=default_device())
            tokenizer = load_tokenizer(base)
            corpus = corpus_from_files(s.files) if s.files else load_corpus(s.corpus)
            blocks = pack_tokens(corpus.train, tokenizer, seq_len=s.seq_len)
            heldout = pack_tokens(corpus.heldout, tokenizer, seq_len=s.seq_len)
            heldout = evenly_spread(heldout, max(1, s.heldout_tokens // s.seq_len))
        num_heads = dense.config.num_attention_heads
        shared, active = self._heads(num_heads, router_class("linear").default_shared_heads(num_heads))
        of_paper = self._heads(num_heads, router_class("query_norm").default_shared_heads(num_heads))

        with self._step("perplexity of the dense original"):
            dense_result = perplexity(dense, heldout)
        dense_row = self._add(ModelRow("dense original", 1.0, dense_result.perplexity))

        with self._step("converting the paper's way (query norms)"):
            paper = convert(
                dense, shared_heads=of_paper[0], active_heads=of_paper[1], router="query_norm", progress=False
            )
        self._measure("MoH, the paper's router, untuned", paper, heldout, dense_row, dense_result)
        if not s.full:
            del paper
        if s.full:
            with self._step("converting our way, weights untouched"):
                plain = self._convert(dense, blocks, shared, active, refined=False)
            self._measure("MoH, contribution router alone, untuned", plain, heldout, dense_row, dense_result)
            del plain
        with self._step("converting our way (as many heads as a token needs, uneven shares, refitted W_O)"):
            ours = self._convert(dense, blocks, shared, active, refined=True)
        self._measure("MoH, ours, untuned", ours, heldout, dense_row, dense_result)

        runs = 3 if s.full else 2
        with self._step("choosing precision and steps"):
            precision = choose_precision(dense.device)
            steps = self._steps(dense, blocks, precision, runs)
        self.console.print(f"[bold]tuning for {steps} steps of {s.batch_size} x {s.seq_len} tokens in {precision}")
        with self._step("tuning the dense control"):
            control = self._tune("dense control", copy.deepcopy(dense), base, tokenizer, blocks, steps, precision, None)
        with self._step("perplexity of the dense control"):
            control_result = perplexity(control, heldout)
        control_row = self._add(compared("dense control, tuned", 1.0, control_result, dense_row, dense_result))
        teacher = dense if s.distillation_weight else None
        if s.full:
            with self._step("tuning the paper's way"):
                paper = self._tune("MoH, the paper's router", paper, base, tokenizer, blocks, steps, precision, teacher)
            self._measure("MoH, the paper's router, tuned", paper, heldout, control_row, control_result)
            del paper
        with self._step("tuning our way"):
            ours = self._tune("MoH, ours", ours, base, tokenizer, blocks, steps, precision, teacher)
        self._measure("MoH, ours, tuned", ours, heldout, control_row, control_result)
        measured = [(f"held-out perplexity, tuned {steps} steps", self.rows[-1], control_row)]
        untuned = next(row for row in self.rows if row.name == "MoH, ours, untuned")
        measured.insert(0, ("held-out perplexity, converted; the control is the original", untuned, dense_row))

        with self._step("saving the model"), replacing_directory(self.output_dir / "model") as scratch:
            ours.save_pretrained(scratch)
            tokenizer.save_pretrained(scratch)
            results = [(what, f"{row.perplexity:.2f}", f"{other.perplexity:.2f}") for what, row, other in measured]
            write_card(scratch, layers_of(ours), **card_of(ours), results=results)
        with self._step("head load"):
            use = inspect_groups(ours, token_groups(ours, {"held-out": heldout[:8]}))
            use.save_csv(self.output_dir / "head_load.csv")
            for suffix in ("png", "svg"):
                save(
                    plot_head_load(use.mean_load(), use.configs, title="Head load on the held-out text"),
                    self.output_dir / f"head_load.{suffix}",
                )
                save(plot_losses(self.losses), self.output_dir / f"losses.{suffix}")
        with self._step("speed, dense against MoH"):
            speed = measure_speed(
                {"dense": control, "MoH": ours}, prompt=heldout[:1], decode_tokens=32, repeats=5, training=True
            )
        with self._step("writing some text"):
            sample = {prompt: _continue(ours, tokenizer, prompt) for prompt in PROMPTS}

        report = DemoReport(
            base_model=Path(base).name if s.base is None else base,
            text=corpus.name if not s.files else ", ".join(s.files),
            licence=corpus.licence,
            heldout_tokens=dense_result.tokens,
            calibration_tokens=max(1, min(s.calibration_tokens // s.seq_len, len(blocks))) * s.seq_len,
            tuning_tokens=steps * s.batch_size * s.seq_len,
            steps=steps,
            precision=precision,
            cpu=cpu_name(),
            threads=torch.get_num_threads(),
            versions={name: version(name) for name in ("torch", "transformers")},
            rows=self.rows,
            layer_shares=use.share(),
            speed=speed,
            losses=self.losses,
            seconds=self.seconds,
            sample=sample,
        )
        report.save(self.output_dir)
        shutil.rmtree(self._work_dir())  # gigabytes of optimiser state, no longer needed
        if not any(self._work_dir().parent.iterdir()):
            self._work_dir().parent.rmdir()
        return report

    def _heads(self, num_heads: int, shared_by_default: int) -> tuple[int, int]:
        """Shared and active heads as requested, or as many as fill up to 7 in 9."""
        shared = self.settings.shared_heads
        shared = shared_by_default if shared is None else shared
        active = self.settings.active_heads
        return shared, max(0, round(num_heads * 7 / 9) - shared) if active is None else active

    def _convert(
        self, dense: PreTrainedModel, blocks: Tensor, shared: int, active: int, *, refined: bool
    ) -> PreTrainedModel:
        model = convert(
            dense,
            shared_heads=shared,
            active_heads=active,
            calibration=blocks,
            calibration_tokens=self.settings.calibration_tokens,
            router=ROUTER if refined else "linear",
            allocation="sensitivity" if refined else "even",
            refit_output=refined,
        )
        for layer in model.model.layers:
            layer.self_attn.router.requires_grad_(False)  # fitted already; tuning it in a few steps only adds noise
        return model

    def _measure(
        self, name: str, model: PreTrainedModel, heldout: Tensor, base: ModelRow, base_result: PerplexityResult
    ) -> None:
        with self._step(f"perplexity of {name}"):
            with record_routing(model) as routing:  # with a threshold, tokens of this text may use more heads, or fewer
                result = perplexity(model, heldout)
            self._add(compared(name, routing.share(), result, base, base_result))

    def _add(self, row: ModelRow) -> ModelRow:
        self.rows.append(row)
        against = f" ({row.above:+.1f} % against {row.compared_with})" if row.compared_with else ""
        self.console.print(f"  [green]{row.name}: held-out perplexity {row.perplexity:.2f}{against}")
        return row

    def _work_dir(self) -> Path:
        """Where these settings' runs keep their checkpoints, so that other settings never resume from them."""
        settings = {k: v for k, v in dataclasses.asdict(self.settings).items() if k != "output_dir"}
        settings["router"] = ROUTER  # a demo of an earlier version, whose router was another, is not resumed
        key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
        return self.output_dir / "training" / key

    def _steps(self, dense: PreTrainedModel, blocks: Tensor, precision: str, runs: int) -> int:
        """As requested, or as in an interrupted demo with these settings, or as many as fit the time."""
        if self.settings.steps is not None:
            return self.settings.steps
        file = self._work_dir() / "steps.json"
        if file.is_file():
            return int(json.loads(file.read_text(encoding="utf-8")))
        steps = self._steps_in_time(dense, blocks, precision, runs)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(steps))
        return steps

    def _steps_in_time(self, dense: PreTrainedModel, blocks: Tensor, precision: str, runs: int) -> int:
        """Steps for which `runs` runs fit the time, from one timed forward and backward pass of each batch's size."""
        batch = blocks[: self.settings.batch_size].to(dense.device)
        seconds = 0.0
        for _ in range(2):  # the first also allocates the memory
            start = time.perf_counter()
            with torch.autocast(dense.device.type, torch.bfloat16, enabled=precision == "bf16"):
                dense(input_ids=batch, labels=batch, use_cache=False).loss.backward()
            seconds = time.perf_counter() - start
            dense.zero_grad(set_to_none=True)
        overhead = 1.25  # the optimiser, and the gather of active heads
        return max(4, min(MAX_STEPS, int(60 * self.settings.minutes / (runs * seconds * overhead))))

    def _tune(
        self,
        name: str,
        model: PreTrainedModel,
        base: str,
        tokenizer: PreTrainedTokenizerBase,
        blocks: Tensor,
        steps: int,
        precision: str,
        teacher: PreTrainedModel | None,
    ) -> PreTrainedModel:
        s = self.settings
        slug = name.lower().replace(",", "").replace("'", "").replace(" ", "-")
        recipe = Recipe(
            model=ModelRecipe(base),
            training=TrainingRecipe(
                output_dir=str(self._work_dir() / slug),
                max_steps=steps,
                learning_rate=s.learning_rate,
                per_device_train_batch_size=s.batch_size,
                seed=s.seed,
                precision=precision,  # type: ignore[arg-type]
                save_steps=steps // 2 + 1,  # one checkpoint on the way, for an interrupted run to resume from
                save_total_limit=1,
                distillation_weight=s.distillation_weight if teacher is not None else 0.0,
            ),
        )
        result = train(recipe, model=model, tokenizer=tokenizer, train_blocks=blocks, teacher=teacher)
        self.losses[name] = result.losses
        return result.model

    @contextmanager
    def _step(self, title: str) -> Iterator[None]:
        self.console.print(f"[bold]{title} ...")
        start = time.perf_counter()
        yield
        self.seconds[title] = round(time.perf_counter() - start, 1)

    def show(self, report: DemoReport) -> None:
        """Print the report."""
        table = Table(title="Held-out perplexity")
        for row in report.quality_table():
            cells = [cell.strip() for cell in row.strip("|").split("|")]
            if row.startswith("| ---"):
                continue
            if not table.columns:
                for cell in cells:
                    table.add_column(cell)
            else:
                table.add_row(*cells)
        console = Console()
        console.print(table)
        for line in report.speed_table():
            console.print(line, markup=False)
        for prompt, text in report.sample.items():
            console.print(f"\n{prompt}{printable(text)}", markup=False)
        console.print(f"\nreport, pictures and model: {self.output_dir.resolve()}", markup=False)


def _continue(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """What the model writes after the prompt, greedily."""
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    with torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=48, do_sample=False, repetition_penalty=1.2)
    return str(tokenizer.decode(out[0, inputs.input_ids.shape[1] :], skip_special_tokens=True))
