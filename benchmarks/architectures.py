"""BERT against ModernBERT of as many parameters: held-out MLM loss after equal time, and what fine-tuning makes of it.

    python -m benchmarks.architectures --data STORE [--minutes 20 --seeds 3 --length 128 --labelled data/sst2_sentence]

Both train MLM alone (`data.objective mlm`) by `launch/train.py` on the same store, with the same batch, masking rate,
recipe (`benchmarks.time_to_loss`, 10 % warm-up) and threads. ModernBERT has the named size; BERT its dimensions of that
size but for the feed-forward width, which makes the parameters equal. Both are scored on the same held-out text, at
a rate of 15 %.

Time is that of the training steps: each runs as many as fit into it by the median step of a trial, and both trials run
right after each other, so let the machine be idle then. Rates are each the best of `--rates` for both, by short runs.
With `--labelled` each trained model is fine-tuned on SST-2 sentences by the recipe and scored on their test file.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks import finetune_peer
from benchmarks.common import ROOT, emit
from benchmarks.finetune import deviation, training_file
from benchmarks.finetune import observe as observe_fine_tuning
from benchmarks.finetune import zerobert as fine_tuning
from benchmarks.pretrain_step import observe
from benchmarks.time_to_loss import Curve, evaluations, steps_in

RECIPE = ("--optim.schedule=linear", "--optim.warmup=0.1", "--optim.betas=[0.9,0.98]")
NO_DROPOUT = ("--model.hidden_dropout=0.0", "--model.attention_dropout=0.0")
TRIAL_STEPS, UNMEASURED = 30, 10
#: share of the time that a trial of a learning rate takes
TRIAL_SHARE = 0.1


@dataclass(frozen=True)
class Rival:
    """An architecture at its dimensions."""

    name: str
    parameters: int
    options: tuple[str, ...]


def rivals(size: str, vocabulary: int, length: int) -> list[Rival]:
    """ModernBERT of a named size, and BERT of the feed-forward width that makes it as large."""
    from engine.config import ARCHITECTURES, ModelConfig

    positions = max(512, length)

    def rival(model: ModelConfig) -> Rival:
        name, wide = model.fresh_architecture, model.dimensions()[3]
        parameters = replace(ARCHITECTURES.get(name).shape(model, vocabulary), pooler=False).parameters()
        options = (f"--model.size={size}", f"--model.architecture={name}", f"--model.intermediate_size={wide}")
        return Rival(name, parameters, (*options, f"--model.max_positions={positions}"))

    modern = rival(ModelConfig(size=size, architecture="modernbert", max_positions=positions))
    hidden = ModelConfig(size=size).dimensions()[0]
    widths = range(8, 8 * hidden, 8)
    berts = [rival(ModelConfig(size=size, intermediate_size=width, max_positions=positions)) for width in widths]
    return [min(berts, key=lambda bert: abs(bert.parameters - modern.parameters)), modern]


class Bench:
    """The runs of one comparison."""

    def __init__(self, given: argparse.Namespace, scratch: Path) -> None:
        self.given, self.scratch, self.runs = given, scratch, 0

    def pretrained(self, rival: Rival, steps: int, rate: float, seed: int, evaluated: int = 0) -> tuple[Path, Any]:
        """A run of `steps` steps with `evaluated` evaluations; its folder and what it showed."""
        given, self.runs = self.given, self.runs + 1
        output = self.scratch / f"run-{self.runs}"
        interval = max(1, steps // evaluated) if evaluated else 0
        command = [
            sys.executable, str(ROOT / "launch" / "train.py"), *rival.options, *RECIPE, *NO_DROPOUT,
            f"--data.path={given.data}", f"--output={output}", "--data.objective=mlm",
            f"--data.sequence_length={given.length}", f"--data.mask_probability={given.mask}",
            "--data.eval_mask_probability=0.15", "--data.workers=0", f"--train.global_batch={given.batch}",
            f"--train.micro_batch={given.batch}", f"--train.steps={steps}", f"--train.threads={given.threads}",
            f"--train.precision={given.precision}", "--train.zero_stage=0", "--train.log_interval=1",
            f"--train.eval_samples={given.held_out}", f"--train.eval_interval={interval}",
            "--train.save_interval=null", "--train.verify_update=0", "--monitor.tensorboard=false",
            f"--optim.learning_rate={rate}", f"--seed={seed}",
        ]  # fmt: skip
        return output, observe(command, given.threads)

    def best_rate(self, rival: Rival, steps: int) -> tuple[float, dict[str, float]]:
        """The learning rate with the lowest held-out loss after `steps` steps, and the loss of each that was tried."""
        if len(self.given.rates) == 1:
            return self.given.rates[0], {}
        tried = {}
        for rate in self.given.rates:
            tried[rate] = evaluations(self.pretrained(rival, steps, rate, seed=0, evaluated=1)[1])[-1][1]
        return min(tried, key=lambda rate: tried[rate]), {f"loss at {rate:g}": loss for rate, loss in tried.items()}

    def accuracy(self, folder: Path, seed: int) -> float:
        """Of a trained model on the test sentences, after fine-tuning."""
        given, self.runs = self.given, self.runs + 1
        labelled: Path = given.labelled
        with training_file(labelled / "train.jsonl.gz", given.limit, self.scratch) as (train, _):
            job = finetune_peer.Job(
                str(folder / "export"), train, str(labelled / "test.jsonl.gz"), seed=seed, epochs=given.epochs,
                batch=32, learning_rate=given.fine_rate, warmup=0.1, max_length=128, threads=given.threads,
            )  # fmt: skip
            output = str(self.scratch / f"run-{self.runs}")
            precision = f"--train.precision={given.precision}"
            command = fine_tuning(job, str(labelled / "dev.jsonl.gz"), output, [precision])
            run = observe_fine_tuning(command, given.threads)
        assert run.accuracy is not None
        return run.accuracy

    def trials(self, both: list[Rival]) -> dict[str, dict[str, Any]]:
        """By architecture: seconds of a step, how many fit into the time, and the best learning rate."""
        given = self.given
        first = given.rates[0]
        step_s = {each.name: self.pretrained(each, TRIAL_STEPS, first, 0)[1].step_s(UNMEASURED) for each in both}
        steps = {name: steps_in(given.minutes * 60, seconds) for name, seconds in step_s.items()}
        rates = {each.name: self.best_rate(each, max(1, round(steps[each.name] * TRIAL_SHARE))) for each in both}
        return {
            each.name: {
                "parameters": each.parameters,
                "step_s": step_s[each.name],
                "steps": steps[each.name],
                "learning rate": rates[each.name][0],
                **rates[each.name][1],
            }
            for each in both
        }

    def compare(self) -> dict[str, Any]:
        """Trials, then both for each seed in turn."""
        from engine.data.store.store import open_store

        given = self.given
        both = rivals(given.size, open_store(given.data).tokenizer.vocab_size, given.length)
        table = self.trials(both)
        curves: dict[str, Curve] = {}
        results: dict[str, list[tuple[float, float | None]]] = {each.name: [] for each in both}
        for seed in range(given.first_seed, given.first_seed + given.seeds):
            for each in both:
                known = table[each.name]
                folder, run = self.pretrained(each, known["steps"], known["learning rate"], seed, given.evaluations)
                curve = [[step * known["step_s"], loss] for step, loss in evaluations(run)]
                accuracy = self.accuracy(folder, seed) if given.labelled else None
                curves[f"{each.name}, seed {seed}"] = curve
                results[each.name].append((curve[-1][1], accuracy))
                print(f"seed {seed}, {each.name}: accuracy {accuracy}, curve {curve}", file=sys.stderr, flush=True)
        for name, found in results.items():
            table[name] |= summary(found)
        title = (
            f"{given.minutes:g} minutes of MLM at {given.mask:.0%}, {given.length} tokens, batch {given.batch}, "
            f"{given.precision}, {given.threads} thread(s), {given.seeds} seed(s)"
        )
        return {"title": title, "rivals": table, "curves": curves}


def summary(results: list[tuple[float, float | None]]) -> dict[str, float]:
    """Means over the seeds of held-out losses and of accuracies, with standard deviations."""
    losses = [loss for loss, _ in results]
    scores = [score for _, score in results if score is not None]
    table = {"held-out MLM loss": statistics.mean(losses), "loss_deviation": deviation(losses)}
    return table | ({"accuracy": statistics.mean(scores), "accuracy_deviation": deviation(scores)} if scores else {})


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add: Callable[..., Any] = parser.add_argument
    add("--data", type=Path, help="a prepared store with a validation split")
    add("--size", default="mini", help="of ModernBERT")
    add("--minutes", type=float, default=20.0, help="time of each run")
    add("--seeds", type=int, default=3)
    add("--first-seed", type=int, default=1, help="to go on with where another call ended")
    add("--length", type=int, default=128, help="tokens of a sequence")
    add("--batch", type=int, default=16, help="sequences of a step")
    add("--mask", type=float, default=0.3, help="share of the tokens that training predicts")
    add("--rates", type=float, nargs="+", default=[5e-4, 1e-3, 2e-3], help="learning rates that are tried")
    add("--held-out", type=int, default=512, help="held-out sequences")
    add("--evaluations", type=int, default=12, help="points of a curve")
    add("--precision", default="bf16", choices=["fp32", "bf16"])
    add("--threads", type=int, default=len(os.sched_getaffinity(0)))
    add("--labelled", type=Path, help="folder of SST-2 sentences, to fine-tune on afterwards")
    add("--limit", type=int, default=0, help="fine-tune on the first so many sentences; 0: all")
    add("--epochs", type=float, default=3.0, help="of fine-tuning")
    add("--fine-rate", type=float, default=1e-4, help="learning rate of fine-tuning")
    add("--json", action="store_true", help="print one JSON document and nothing else")
    return parser.parse_args()


def main() -> int:
    given = parse()
    if given.data is None or not given.data.is_dir():
        sys.exit(
            f"skipped: no prepared store at {given.data}: make one by zerobert prepare --source TEXT --output STORE"
        )
    with tempfile.TemporaryDirectory() as folder:
        emit([Bench(given, Path(folder)).compare()], given.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
