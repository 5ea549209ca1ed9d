"""Pre-train with transformers' Trainer: the rival of `benchmarks.pretrain_step`, in a process of its own.

Needs accelerate, which Trainer imports. Reads one argument, the JSON of a `Job`. Prints "step N" after every step,
which the benchmark clocks from outside as it does zerobert's lines, "held-out LOSS" where it evaluates, and on a GPU
"memory BYTES", the most that torch's allocator gave out.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Job:
    """One run of the rival."""

    samples: str
    """.npz of padded samples: input_ids, token_type_ids, attention_mask, labels [N, S]; next_sentence_label [N]"""
    hidden: int
    layers: int
    heads: int
    intermediate: int
    vocabulary: int
    batch: int
    steps: int
    threads: int
    seed: int = 1
    accumulation: int = 1
    learning_rate: float = 1e-4
    warmup: int = 0
    compiled: bool = False
    workers: int = 1
    held_out: str | None = None
    """.npz of samples whose MLM loss is printed at the end"""
    device: str = "cpu"
    """or cuda"""
    masked_head: bool = False
    """let the MLM head see masked tokens only, which transformers leaves to its users; of ModernBERT its own way"""
    architecture: str = "bert"
    """or modernbert, for MLM alone, in batches padded to their longest sequence"""
    length: int = 128
    """tokens of the longest sequence"""
    precision: str = "bf16"
    """or fp32"""


def model(job: Job) -> Any:
    """BertForPreTraining, or ModernBertForMaskedLM by scaled_dot_product_attention, with its default dropout."""
    from transformers import BertConfig, BertForPreTraining

    if job.architecture == "modernbert":
        return modern(job)
    return (masked_rows() if job.masked_head else BertForPreTraining)(
        BertConfig(
            vocab_size=job.vocabulary,
            hidden_size=job.hidden,
            num_hidden_layers=job.layers,
            num_attention_heads=job.heads,
            intermediate_size=job.intermediate,
        )
    )


def modern(job: Job) -> Any:
    """ModernBertForMaskedLM; its sparse prediction gives the head masked tokens alone."""
    from transformers import ModernBertConfig, ModernBertForMaskedLM

    config = ModernBertConfig(
        vocab_size=job.vocabulary,
        hidden_size=job.hidden,
        num_hidden_layers=job.layers,
        num_attention_heads=job.heads,
        intermediate_size=job.intermediate,
        max_position_embeddings=job.length,
        sparse_prediction=job.masked_head,
        pad_token_id=0,
        **dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")),
    )
    config._attn_implementation = "sdpa"
    return ModernBertForMaskedLM(config)


def trimmed(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A batch without the columns that hold no token of it."""
    import torch

    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    longest = int(batch["attention_mask"].sum(1).max())
    return {name: values[:, :longest].contiguous() for name, values in batch.items()}


def masked_rows() -> Any:
    """BertForPreTraining whose head is given the states of masked tokens; its loss is the same."""
    from torch import Tensor
    from torch.nn import functional as F  # noqa: N812
    from transformers import BertForPreTraining

    class MaskedRows(BertForPreTraining):
        def forward(
            self,
            input_ids: Tensor,
            attention_mask: Tensor,
            token_type_ids: Tensor,
            labels: Tensor,
            next_sentence_label: Tensor,
        ) -> dict[str, Tensor]:
            states, pooled = self.bert(input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids)[:2]
            masked = labels != -100
            scores, follows = self.cls(states[masked], pooled)
            return {"loss": F.cross_entropy(scores, labels[masked]) + F.cross_entropy(follows, next_sentence_label)}

    return MaskedRows


def samples(path: str) -> Any:
    """A data set over the arrays of a file."""
    import numpy as np
    import torch

    arrays = {name: torch.from_numpy(values.astype(np.int64)) for name, values in np.load(path).items()}

    class Samples(torch.utils.data.Dataset[dict[str, Any]]):
        def __len__(self) -> int:
            return len(arrays["input_ids"])

        def __getitem__(self, index: int) -> dict[str, Any]:
            return {name: values[index] for name, values in arrays.items()}

    return Samples()


def progress() -> Any:
    """A callback that prints how many steps are done."""
    from transformers import TrainerCallback

    class Progress(TrainerCallback):
        def on_step_end(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
            print(f"step {state.global_step}", flush=True)

    return Progress()


def held_out_loss(trained: Any, path: str) -> float:
    """Mean MLM cross-entropy in nats over all masked tokens of a file."""
    import torch

    total, count = 0.0, 0
    trained.eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for batch in torch.utils.data.DataLoader(samples(path), batch_size=32):
            labels = batch.pop("labels")
            batch.pop("next_sentence_label")
            logits = trained(**batch).prediction_logits[labels != -100].float()
            kept = labels[labels != -100]
            total += float(torch.nn.functional.cross_entropy(logits, kept, reduction="sum"))
            count += len(kept)
    return total / count


def run(job: Job) -> None:
    """Train, and print the held-out loss."""
    import torch
    from transformers import Trainer, TrainingArguments, set_seed

    torch.set_num_threads(job.threads)
    set_seed(job.seed)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            seed=job.seed,
            max_steps=job.steps,
            per_device_train_batch_size=job.batch,
            gradient_accumulation_steps=job.accumulation,
            learning_rate=job.learning_rate,
            lr_scheduler_type="linear",
            warmup_steps=job.warmup,
            weight_decay=0.01,
            max_grad_norm=1.0,
            optim="adamw_torch_fused",
            bf16=job.precision == "bf16",
            use_cpu=job.device == "cpu",
            torch_compile=job.compiled,
            dataloader_num_workers=job.workers,
            logging_steps=50,
            save_strategy="no",
            eval_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        collator = {"data_collator": trimmed} if job.architecture == "modernbert" else {}
        trainer = Trainer(
            model=model(job), args=arguments, train_dataset=samples(job.samples), callbacks=[progress()], **collator
        )
        trainer.train()
        if job.held_out:
            print(f"held-out {held_out_loss(trainer.model, job.held_out)}", flush=True)
        if job.device == "cuda":
            print(f"memory {torch.cuda.max_memory_allocated()}", flush=True)


def command(python: str, job: Job) -> list[str]:
    """The command line of a job under an interpreter."""
    return [python, str(Path(__file__).resolve()), json.dumps(asdict(job))]


if __name__ == "__main__":
    run(Job(**json.loads(sys.argv[1])))
