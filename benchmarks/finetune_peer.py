"""Fine-tune with transformers' Trainer: the rival of `benchmarks.finetune`, in a process of its own.

Needs accelerate, which Trainer imports. Reads one argument, the JSON of a `Job`. Prints "step N" at every `SHOWN` steps
and after the last one, which `benchmarks.finetune` clocks from outside as it does zerobert's lines, and the accuracy.
"""

from __future__ import annotations

import gzip
import json
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

SHOWN = 10


@dataclass(frozen=True)
class Job:
    """One run of the rival; the fields that the two share mean the same for zerobert."""

    model: str
    train: str
    test: str
    seed: int
    epochs: float
    batch: int
    learning_rate: float
    warmup: float
    max_length: int
    threads: int
    precision: str = "bf16"
    """or fp32"""
    max_steps: int = -1
    """ends the run early; -1 trains all epochs"""
    group_by_length: bool = False
    workers: int = 0
    compiled: bool = False
    evaluated: bool = True
    """score the test sentences at the end"""
    columns: tuple[str, ...] = ("sentence",)
    """of the text, or of the texts of a pair"""
    lora_rank: int = 0
    """of adapters on all linear layers of the encoder, by peft; 0 trains all weights"""


def read(path: str) -> list[dict[str, Any]]:
    """Rows of a .jsonl or .jsonl.gz file."""
    opener = gzip.open if path.endswith(".gz") else open
    with opener(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def tokenised(path: str, tokenizer: Any, job: Job) -> Any:
    """A data set of unpadded token ids, labels and lengths."""
    from datasets import Dataset

    rows = read(path)
    texts = [[row[column] for row in rows] for column in job.columns]
    # The folder's tokenizer.json would pad everything to 128; Trainer's collator pads to the longest of a batch.
    encoded = tokenizer(*texts, padding=False, truncation=True, max_length=job.max_length)
    columns = dict(encoded) | {
        "labels": [int(row["label"]) for row in rows],
        "length": [len(ids) for ids in encoded["input_ids"]],
    }
    return Dataset.from_dict(columns)


def progress() -> Any:
    """A callback that prints how many steps are done."""
    from transformers import TrainerCallback

    class Progress(TrainerCallback):
        def on_step_end(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
            if state.global_step % SHOWN == 0 or state.global_step == state.max_steps:
                print(f"step {state.global_step}", flush=True)

    return Progress()


def arguments(job: Job, folder: str) -> Any:
    """Trainer's arguments; what isn't named is its default."""
    from transformers import TrainingArguments

    return TrainingArguments(
        output_dir=folder,
        seed=job.seed,
        num_train_epochs=job.epochs,
        max_steps=job.max_steps,
        per_device_train_batch_size=job.batch,
        per_device_eval_batch_size=job.batch,
        learning_rate=job.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=job.warmup,
        weight_decay=0.01,
        adam_epsilon=1e-6,
        max_grad_norm=1.0,
        optim="adamw_torch_fused",
        bf16=job.precision == "bf16",
        use_cpu=True,
        torch_compile=job.compiled,
        dataloader_num_workers=job.workers,
        train_sampling_strategy="group_by_length" if job.group_by_length else "random",
        logging_steps=SHOWN,
        save_strategy="no",
        eval_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def adapted(model: Any, rank: int) -> Any:
    """The model under LoRA as zerobert's defaults have it: alpha twice the rank, no dropout, the head trained too."""
    import peft

    targets = r".*encoder\.layer\.\d+\..*(query|key|value|dense)"
    options = {"r": rank, "lora_alpha": 2 * rank, "lora_dropout": 0.0, "target_modules": targets}
    return peft.get_peft_model(model, peft.LoraConfig(task_type=peft.TaskType.SEQ_CLS, **options))


def run(job: Job) -> None:
    """Train, and score on the test sentences."""
    import torch
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorWithPadding,
        Trainer,
        set_seed,
    )

    torch.set_num_threads(job.threads)
    set_seed(job.seed)
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    model = AutoModelForSequenceClassification.from_pretrained(job.model, num_labels=2)
    if job.lora_rank:
        model = adapted(model, job.lora_rank)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            args=arguments(job, folder),
            train_dataset=tokenised(job.train, tokenizer, job),
            data_collator=DataCollatorWithPadding(tokenizer),
            callbacks=[progress()],
        )
        trainer.train()
        if job.evaluated:
            predicted = trainer.predict(tokenised(job.test, tokenizer, job))
            hits = predicted.predictions.argmax(-1) == predicted.label_ids
            print(f"accuracy {float(hits.mean())}", flush=True)


def command(python: str, job: Job) -> list[str]:
    """The command line of a job under an interpreter."""
    return [python, str(Path(__file__).resolve()), json.dumps(asdict(job))]


if __name__ == "__main__":
    run(Job(**json.loads(sys.argv[1])))
