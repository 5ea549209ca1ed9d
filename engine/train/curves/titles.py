"""Titles, units and descriptions of the curves, which TensorBoard shows beside them."""

from __future__ import annotations

from engine.config import Title, task_entries

#: prefix of a curve's tag -> the data or weights that it is about
PARTS = {
    "train": ("training", "Mean over the optimizer steps since the last point."),
    "eval": ("held-out", "On the held-out data, dropout off."),
    "test": ("test", "On the test file, of the model that the run exported."),
}
#: titles that all tasks share; each task has titles of its own scores too
LOSS = {"loss": Title("loss [nats]", "What training minimises; pre-training adds both of its losses.")}
RUNNING = {
    "train/learning_rate": Title("learning rate", "Of the last optimizer step."),
    "train/grad_norm": Title("gradient norm", "L2 norm of the whole gradient before clipping, in the last step."),
    "train/tokens_per_second": Title("throughput [tokens/s]", "Over all ranks, without the time of evaluations and "
                                     "saves; padding doesn't count. After a resume: of the steps since then."),
    "train/step_time": Title("time of an optimizer step [s]", "Without the time of evaluations and saves."),
    "train/memory_bytes": Title("peak memory of rank 0 [bytes]", "Allocated on its GPU; on CPUs held by its process."),
    "train/orthogonality": Title("distance of AdaLoRA's factors from orthogonal", "Mean of ||A A^T - I|| over all "
                                 "factors, B transposed; the loss has adapter.orthogonality times it."),
    "train/r_drop": Title("divergence of two passes [nats]", "Symmetric Kullback-Leibler divergence of what dropout "
                          "leaves of a prediction (regression: squared difference); the loss has regularise.r_drop "
                          "times it."),
    "train/adversarial_loss": Title("loss under noise", "Of the last pass, whose noise on the words' embeddings raises "
                                    "it most (regularise.adversarial)."),
    "train/hard_loss": Title("loss against the labels [nats]", "The task's own, without that of teachers (distil)."),
    "train/soft_loss": Title("divergence from the teachers", "Kullback-Leibler divergence [nats] of predictions, times "
                             "distil.temperature squared; numbers: squared difference, embeddings: 1 - cosine."),
    "train/hidden_loss": Title("distance of hidden states", "Mean squared difference from the teachers', through "
                               "projections where widths differ."),
    "train/relation_loss": Title("divergence of relations [nats]", "Of queries, keys and values among a sequence's "
                                 "tokens, summed over the three (MiniLM v2)."),
    "train/loss_scale": Title("loss scale", "fp16 only: what the loss is multiplied by."),
    "train/skipped_steps": Title("skipped steps [count]", "fp16 only: updates left out because their gradient "
                                 "overflowed, since the run began."),
    "trust_ratio/lowest": Title("lowest trust ratio", "LAMB: the least over the parameters that are scaled."),
    "trust_ratio/median": Title("median trust ratio", "LAMB: the median over the parameters that are scaled."),
    "trust_ratio/highest": Title("highest trust ratio", "LAMB: the largest over the parameters that are scaled."),
}  # fmt: skip
LAYERS = {
    "weight_norm": Title("weight norm", "L2 norm of the layer's weights before the step."),
    "update_norm": Title("update norm", "L2 norm of the change of the layer's weights in the step."),
    "update_to_weight": Title("update / weight", "Norm of the change of the layer's weights over their own norm."),
}


def title_of(tag: str) -> Title:
    """Title and description of a curve by its tag; an unknown one is called by its tag.

    >>> title_of("train/tokens_per_second").name
    'throughput [tokens/s]'
    >>> title_of("eval/mlm_loss").name
    'held-out masked-language-model loss [nats]'
    >>> title_of("weight_norm/layer.3").name
    'weight norm, layer.3'
    """
    part, _, name = tag.partition("/")
    if tag in RUNNING:
        return RUNNING[tag]
    scores = LOSS | {score: title for entry in task_entries() for score, title in entry.scores.items()}
    if part in PARTS and name in scores:
        whose, when = PARTS[part]
        score = scores[name]
        return Title(f"{whose} {score.name}", f"{score.description} {when}")
    if part in LAYERS:
        return Title(f"{LAYERS[part].name}, {name}", LAYERS[part].description)
    return Title(tag, "")
