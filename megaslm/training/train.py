"""`train(run, ...)`: config -> data -> model -> engine -> loop, top to bottom."""

import gc
import math
import os
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from megaslm.checkpoint import (
    Checkpoint,
    apply_retention,
    check_compatible,
    check_engine,
    latest_sound,
    list_checkpoints,
    restore,
    save_checkpoint,
)
from megaslm.config import BatchLayout, RunConfig, requested_precision, resolve_batch, resolve_engine_config, zero_stage
from megaslm.errors import UserError
from megaslm.generation import sample_tokens
from megaslm.model import LanguageModel, count_parameters, flops_per_token, initialize_parameters
from megaslm.parallel import Ranks, init_distributed
from megaslm.training import report
from megaslm.training.batches import step_batches, to_device
from megaslm.training.device import check_precision, device_name, memory_used, peak_flops, preferred_precision
from megaslm.training.engine import DTYPES, TrainingEngine, compile_blocks
from megaslm.training.evaluation import Evaluation, evaluate
from megaslm.training.metrics import MetricsLog, Stopwatch, read_metrics
from megaslm.training.preparation import RunData, identity, prepare_data, total_steps
from megaslm.training.run_dir import environment, open_run_dir, write_json
from megaslm.training.schedule import learning_rate
from megaslm.training.stop import StopRequest

WARMUP_STEPS_LEFT_OUT = 5
"""First steps of a process that the ETA ignores: allocation, compilation, caches."""


@dataclass
class Progress:
    """Where a run stands. Everything here goes into the checkpoint; samples is the whole state of the data."""

    step: int = 0
    samples: int = 0
    tokens: int = 0
    skipped_steps: int = 0
    seconds: float = 0.0
    best_loss: float | None = None
    best_step: int | None = None
    interval_loss: float = 0.0
    interval_targets: int = 0


@dataclass(frozen=True)
class Options:
    """What the command line says beside the configs."""

    run_dir: Path
    resume: str = "auto"
    dry_run: bool = False


def train(run: RunConfig, engine_file: dict, options: Options) -> None:
    """Train `run` under the engine config `engine_file`, continuing what `options.run_dir` holds.

    Every rank calls this. Raises UserError for what a user can mend.
    """
    ranks = init_distributed()
    say = (lambda *lines: print(*lines, sep="\n", flush=True)) if ranks.is_first else (lambda *lines: None)
    try:
        run, data = prepare_data(run, ranks)
        steps = total_steps(run, data.training)
        layout = resolve_batch(run.train.global_batch_size, run.train.micro_batch_size, ranks.data_parallel_size)
        precision = requested_precision(
            engine_file, run.train.precision, auto=lambda: preferred_precision(ranks.device)
        )
        check_precision(precision, ranks.device)
        engine_config = resolve_engine_config(
            engine_file, run=run, precision=precision, batch=layout, data_parallel_size=ranks.data_parallel_size
        )
        checkpoint = None if options.dry_run else find_checkpoint(options, ranks, say)
        if checkpoint is not None:
            check_compatible(checkpoint.global_state["identity"], identity(run, data))
            if checkpoint.step >= steps:
                say(f"{options.run_dir} is finished: step {checkpoint.step} of {steps}; to go on, raise "
                    "train.max_steps (or max_tokens, max_epochs), or choose another --run_dir")  # fmt: skip
                return
        try:
            engine, compiled = build_engine(run, engine_config, layout, precision, ranks)
            say(header(run, engine_config, layout, precision, compiled, steps, data, options, ranks))
            if options.dry_run:
                say(dry_run(engine, run, data, layout, ranks))
                return
            Training(run, engine_config, options, ranks, data, layout, engine, steps, precision, say).go(checkpoint)
        except torch.OutOfMemoryError as error:
            raise out_of_memory(run, layout, engine_config, error) from error
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def find_checkpoint(options: Options, ranks: Ranks, say) -> Checkpoint | None:
    """The newest sound checkpoint of the run folder, under --resume auto."""
    directory = options.run_dir / "checkpoints"
    if options.resume == "never":
        if list_checkpoints(directory):
            raise UserError(
                f"{options.run_dir} already holds a run; leave out --resume never to continue it, "
                "or choose another --run_dir"
            )
        return None
    return latest_sound(directory, report=say)


def build_engine(
    run: RunConfig, engine_config: dict, layout: BatchLayout, precision: str, ranks: Ranks
) -> tuple[TrainingEngine, str]:
    """Model with its initial weights, compiled where asked for, inside the engine; and how compilation went."""
    model = LanguageModel(run.model)
    initialize_parameters(model, run.model, run.train.seed)
    model.to(ranks.device)
    model.decoder.activation_checkpointing = run.train.activation_checkpointing
    compiled = "off"
    if run.train.compile:
        failure = compile_blocks(model, layout.micro_batch_size, run.seq_length, DTYPES[precision])
        if ranks.any(failure is not None):
            for block in model.decoder.blocks:
                block._compiled_call_impl = None
            compiled = f"fell back to eager: {failure or 'another rank could not compile'}"
        else:
            compiled = "every block"
    engine = TrainingEngine(model, run, engine_config, ranks)
    check_engine(engine.deepspeed)
    return engine, compiled


def header(run, engine_config, layout, precision, compiled, steps, data: RunData, options, ranks) -> str:
    """What is about to happen, before it happens."""
    model, parameters = run.model, count_parameters(run.model)
    tokens = steps * run.tokens_per_step
    flops = tokens * flops_per_token(model, run.seq_length)
    zero = zero_stage(engine_config)
    attention = f"{model.num_heads} heads of {model.head_dim}, {model.num_kv_heads} key/value"
    epochs = steps * run.train.global_batch_size / data.training.samples_per_epoch
    rows = [
        ("parameters", f"{report.format_count(parameters)} ({parameters:,}), vocabulary {model.vocab_size:,}"),
        ("model", f"{model.num_layers} layers, width {model.hidden_size}, {attention}, {model.feed_forward} "
                  f"{model.ffn_hidden_size}, {model.norm}, {model.position}"),
        ("tokens", f"{report.format_count(tokens)} in {steps:,} steps of {run.tokens_per_step:,} "
                   f"({tokens / parameters:.3g} per parameter, {epochs:.3g} epochs)"),
        ("FLOPs", f"{flops:.3g} ({flops / parameters:.3g} per parameter)"),
        ("data", f"{data.training.tokens_per_epoch:,} training tokens, "
                 f"{data.validation.num_targets:,} validation targets"),
        ("layout", f"{ranks.world_size} x {device_name(ranks.device)}, ZeRO {zero}, micro-batch "
                   f"{layout.micro_batch_size} x {layout.accumulation_steps} accumulation "
                   f"x {ranks.data_parallel_size} data parallel"),
        ("backends", f"kernels reference, {torch.distributed.get_backend()}, optimizer {run.optimizer.type}, "
                     f"compile {compiled}, {ranks.num_threads} threads a rank"),
        ("precision", precision),
        ("run folder", str(options.run_dir)),
        ("to stop", f"Ctrl-C or kill -TERM {os.getpid()}: saves, then leaves"),
    ]  # fmt: skip
    return report.format_table(f"{run.name}: {run.description}" if run.description else run.name, rows)


def dry_run(engine: TrainingEngine, run: RunConfig, data: RunData, layout: BatchLayout, ranks: Ranks) -> str:
    """One step with the largest batch; what it took."""
    started = time.perf_counter()
    loss = float(engine.train_step(step_batches(data.training, 0, layout, ranks), run.optimizer.lr))
    targets = layout.micro_batch_size * layout.accumulation_steps * run.seq_length
    memory = ", ".join(f"{key} {report.format_bytes(value)}" for key, value in memory_used(ranks.device).items())
    rows = [
        ("loss", f"{loss / targets:.4f} (ln vocabulary: {math.log(run.model.vocab_size):.4f})"),
        ("grad norm", f"{engine.grad_norm:.3f}"),
        ("memory", memory),
        ("FLOPs", f"{run.tokens_per_step * flops_per_token(run.model, run.seq_length):.3g} a step"),
        ("time", f"{time.perf_counter() - started:.2f} s for the first step (with start-up costs)"),
    ]
    return report.format_table("dry run: one step, nothing written", rows)


def out_of_memory(run: RunConfig, layout: BatchLayout, engine_config: dict, error: Exception) -> UserError:
    """What to lower, in the order that costs least."""
    advice = []
    if layout.micro_batch_size > 1:
        advice.append(f"train.micro_batch_size={layout.micro_batch_size // 2} (the global batch stays the same)")
    if not run.train.activation_checkpointing:
        advice.append("train.activation_checkpointing=true")
    if zero_stage(engine_config) < 3:
        advice.append("--ds_config ds_configs/zero3.json (or zero3_offload.json)")
    advice.append(f"data.seq_length={run.seq_length // 2}")
    return UserError(
        f"out of memory on the device with micro-batch {layout.micro_batch_size} x {run.seq_length} tokens; "
        f"lower: {'; '.join(advice)}. ({str(error).splitlines()[0]})",
        on_one_rank=True,
    )


class Training:
    """The loop and what it does at its intervals."""

    def __init__(self, run, engine_config, options, ranks, data, layout, engine, steps, precision, say):
        self.run: RunConfig = run
        self.engine_config: dict = engine_config
        self.options: Options = options
        self.ranks: Ranks = ranks
        self.data: RunData = data
        self.layout: BatchLayout = layout
        self.engine: TrainingEngine = engine
        self.steps: int = steps
        self.precision: str = precision
        self.say = say
        self.progress = Progress()
        self.horizon_samples = (run.schedule.horizon_steps or steps) * run.train.global_batch_size
        self.flops_per_token = flops_per_token(run.model, run.seq_length)
        self.flops_per_token_causal = flops_per_token(run.model, run.seq_length, causal=True)
        self.interval_losses = torch.zeros((), dtype=torch.float64, device=ranks.device)
        self.last_evaluation: Evaluation | None = None
        self.saved_step = -1

    def go(self, checkpoint: Checkpoint | None) -> None:
        """Continue from `checkpoint` or start, run to the end or to a stop, and report."""
        if checkpoint is not None:
            state = restore(checkpoint, self.engine.deepspeed)
            self.progress = Progress(**state["progress"])
            self.saved_step = self.progress.step
            if self.ranks.is_first:
                self.interval_losses.fill_(self.progress.interval_loss)
            self.say(f"continuing from {checkpoint.path} at step {self.progress.step}")
        self.resumed_skips = self.progress.skipped_steps
        run_dir = self.options.run_dir
        facts = environment(self.ranks, self.precision)
        self.ranks.on_first(lambda: open_run_dir(run_dir, self.run, self.engine_config, facts))
        self.log = None
        # On rank 0 alone; through on_first for its errors, while the log itself stays on that rank.
        self.ranks.on_first(self._open_log)
        self.started = time.perf_counter() - self.progress.seconds
        self.watch, self.clean_steps, self.clean_seconds = Stopwatch(), 0, 0.0
        try:
            with StopRequest(self.ranks, self.run.train.max_seconds) as stop:
                reason = self._loop(stop)
            self._finish(reason)
        finally:
            if self.log is not None:
                self.log.close()

    def _open_log(self) -> None:
        resolved = self.run.model_dump(mode="json")
        self.log = MetricsLog(
            self.options.run_dir, self.run.logging, self.run.name, resolved, resume_step=self.progress.step
        )

    def _loop(self, stop: StopRequest) -> str | None:
        progress, run = self.progress, self.run
        first_step = progress.step + 1
        while progress.step < self.steps:
            lr = learning_rate(
                progress.samples,
                horizon=self.horizon_samples,
                batch=run.train.global_batch_size,
                optimizer=run.optimizer,
                schedule=run.schedule,
            )
            batches = step_batches(self.data.training, progress.samples, self.layout, self.ranks)
            self.interval_losses += self.engine.train_step(batches, lr)
            progress.step += 1
            progress.samples += run.train.global_batch_size
            progress.tokens += run.tokens_per_step
            progress.interval_targets += run.tokens_per_step
            if progress.step == first_step:
                # What exists now lives as long as the run: the collector need not walk it again (half-second stalls).
                gc.collect()
                gc.freeze()
            done = progress.step == self.steps
            reason = stop.agreed()
            if done or _due(progress.step, run.logging.interval):
                # An interval that a stop cuts short is not logged: its sums go through the checkpoint to the next run.
                self._log_interval(lr, first_step)
            if done or _due(progress.step, run.eval.interval):
                self._evaluate()
            if done or reason is not None or _due(progress.step, run.checkpoint.interval):
                self._save()
            if reason is not None:
                return reason
        return None

    def _log_interval(self, lr: float, first_step: int) -> None:
        """One record and one line; the only place of the loop that waits for the device."""
        progress = self.progress
        loss_sum = float(self.ranks.sum(self.interval_losses))
        seconds = self.watch.restart()
        steps = min(progress.interval_targets // self.run.tokens_per_step, progress.step - first_step + 1)
        tokens_per_s = steps * self.run.tokens_per_step / seconds
        per_device = tokens_per_s / self.ranks.world_size
        peak = peak_flops(self.ranks.device)
        progress.skipped_steps = self.resumed_skips + self.engine.skipped_steps
        record = {
            "kind": "train",
            "step": progress.step,
            "samples": progress.samples,
            "tokens": progress.tokens,
            "loss": loss_sum / progress.interval_targets,
            "grad_norm": self.engine.grad_norm,
            "lr": lr,
            "tokens_per_s": tokens_per_s,
            "ms_per_step": 1e3 * seconds / steps,
            "tflops": self.flops_per_token * per_device / 1e12,
            "tflops_causal": self.flops_per_token_causal * per_device / 1e12,
            "mfu": self.flops_per_token * per_device / peak if peak else None,
            "skipped_steps": progress.skipped_steps,
            "loss_scale": self.engine.loss_scale,
            **memory_used(self.ranks.device),
        }
        if progress.step - first_step >= WARMUP_STEPS_LEFT_OUT:
            self.clean_steps, self.clean_seconds = self.clean_steps + steps, self.clean_seconds + seconds
        self.interval_losses.zero_()
        progress.interval_loss, progress.interval_targets = 0.0, 0
        if self.log is not None:
            eta = (self.steps - progress.step) * self.clean_seconds / self.clean_steps if self.clean_steps else None
            self.log.write(record)
            self.say(report.train_line(record, self.steps, eta))

    def _evaluate(self) -> None:
        """Loss on the validation part, a sample of text, and a checkpoint where it is the best so far."""
        progress = self.progress
        with self.watch.paused():
            result = evaluate(
                self.engine,
                self.data.validation,
                self.data.tokenizer,
                self.run.train.micro_batch_size,
                self.ranks,
                self.run.eval.max_sequences,
            )
            self.last_evaluation = result
            record = {
                "kind": "eval",
                "step": progress.step,
                "samples": progress.samples,
                "tokens": progress.tokens,
                "perplexity": result.perplexity,
                **asdict(result),
            }
            if self.log is not None:
                self.log.write(record)
                self.say(report.eval_line(record))
            if self.run.eval.sample_tokens:
                self._sample()
        if progress.best_loss is None or result.loss < progress.best_loss:
            progress.best_loss, progress.best_step = result.loss, progress.step
            if self.run.checkpoint.keep_best:
                self._save()

    def _sample(self) -> None:
        if self.data.tokenizer is None:
            return
        tokenizer, config = self.data.tokenizer, self.run.eval
        if config.sample_prompt:
            prompt = tokenizer.encode(config.sample_prompt, "eval.sample_prompt")
        elif tokenizer.eod_id is not None:
            prompt = np.array([tokenizer.eod_id])
        else:
            prompt = self.data.validation.batch(0, 1)[0][0, :1]
        generated = sample_tokens(
            self.engine.model,
            to_device(prompt, self.ranks.device),
            config.sample_tokens,
            temperature=config.sample_temperature,
            top_k=config.sample_top_k,
            seed=self.run.train.seed + self.progress.step,
            stop_id=tokenizer.eod_id,
        )
        text = config.sample_prompt + tokenizer.decode(generated)
        if self.log is not None:
            self.log.write_text(self.progress.step, text)
        self.say("sample:", *(f"    {line}" for line in text.splitlines()))

    def _save(self) -> None:
        """Write a checkpoint of this step, once, and drop the ones that are no longer kept."""
        progress, directory = self.progress, self.options.run_dir / "checkpoints"
        if self.saved_step == progress.step:
            return
        with self.watch.paused():
            # Afterwards rank 0 carries the sum of all ranks, here as in a run that continues from this checkpoint.
            progress.interval_loss = float(self.ranks.sum(self.interval_losses))
            self.interval_losses.fill_(progress.interval_loss if self.ranks.is_first else 0.0)
            progress.skipped_steps = self.resumed_skips + self.engine.skipped_steps
            progress.seconds = time.perf_counter() - self.started
            path = save_checkpoint(
                directory,
                self.engine.deepspeed,
                step=progress.step,
                run_config=self.run.model_dump(mode="json"),
                global_state={"progress": asdict(progress), "identity": identity(self.run, self.data)},
            )
            self.saved_step = progress.step
            best = f"step_{progress.best_step:08d}" if self.run.checkpoint.keep_best and progress.best_step else None
            apply_retention(directory, keep_last=self.run.checkpoint.keep_last, best=best)
            self.say(f"saved {path}")

    def _finish(self, reason: str | None) -> None:
        """Summary and curves, on rank 0."""
        if self.log is None:
            return
        progress = self.progress
        progress.seconds = time.perf_counter() - self.started
        train = [r for r in read_metrics(self.options.run_dir / "metrics.jsonl") if r["kind"] == "train"]
        summary = {
            "stopped_by": reason or "end of the run",
            "steps": progress.step,
            "total_steps": self.steps,
            "tokens": progress.tokens,
            "seconds": progress.seconds,
            "tokens_per_s": statistics.median(r["tokens_per_s"] for r in train) if train else None,
            "train_loss": train[-1]["loss"] if train else None,
            "validation_loss": self.last_evaluation.loss if self.last_evaluation else None,
            "perplexity": self.last_evaluation.perplexity if self.last_evaluation else None,
            "bits_per_byte": self.last_evaluation.bits_per_byte if self.last_evaluation else None,
            "best_validation_loss": progress.best_loss,
            "best_step": progress.best_step,
            "ln_vocabulary": math.log(self.run.model.vocab_size),
            "skipped_steps": progress.skipped_steps,
            "parameters": count_parameters(self.run.model),
            **memory_used(self.ranks.device),
        }
        write_json(self.options.run_dir / "summary.json", summary)
        self.say(summary_table(summary))
        if train:
            self.say(f"curves: {report.write_curves(self.options.run_dir)}")
        if reason is not None:
            self.say(f"stopped by {reason} at step {progress.step} of {self.steps}; the same command continues")


def summary_table(summary: dict) -> str:
    """The run in a few lines."""
    rows = [
        ("steps", f"{summary['steps']:,} of {summary['total_steps']:,} ({summary['stopped_by']})"),
        ("tokens", f"{summary['tokens']:,}"),
        ("time", report.format_duration(summary["seconds"])),
        ("memory", report.format_bytes(summary["memory_bytes"])),
    ]
    if summary["train_loss"] is not None:
        rows += [
            ("tokens/s", f"{summary['tokens_per_s']:,.0f} (median of the intervals)"),
            ("training loss", f"{summary['train_loss']:.4f}"),
        ]
    if summary["validation_loss"] is not None:
        gain = 100 * (1 - summary["validation_loss"] / summary["ln_vocabulary"])
        bits = summary["bits_per_byte"]
        rows += [
            ("validation loss", f"{summary['validation_loss']:.4f} ({gain:.0f} % under ln(vocabulary) "
                                f"{summary['ln_vocabulary']:.3f})"),
            ("perplexity", f"{summary['perplexity']:,.2f}"),
            *([("bits per byte", f"{bits:.4f}")] if bits is not None else []),
            ("best", f"{summary['best_validation_loss']:.4f} at step {summary['best_step']}"),
        ]  # fmt: skip
    if summary["skipped_steps"]:
        rows.append(("skipped steps", f"{summary['skipped_steps']} with a gradient that was not finite"))
    return report.format_table("summary", rows)


def _due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0
