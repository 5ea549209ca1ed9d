"""Take out of a transformers model what its weights hold as zeros, exactly: layers become uneven, and really smaller.

A Hugging Face folder can't say that its layers differ; a graph for a runtime, such as ONNX, can.
"""

from __future__ import annotations

from torch import nn

from engine.model.pruning.units import sublayers


def slim(model: nn.Module) -> nn.Module:
    """The same model, changed in place, without heads and neurons whose columns of an output matrix are all zeros.

    What is computed differs by the rounding of sums at most. A sub-layer keeps one unit where all are zeros, since
    runtimes don't multiply empty matrices. The configuration stays, so the model can't be saved as a folder.

    Args:
        model: of transformers, BERT, RoBERTa or ModernBERT.
    """
    for part in sublayers(model):
        kept = part.kept()
        if not bool(kept.any()):
            kept[0] = True
        if not bool(kept.all()):
            part.shrink(kept)
            if part.kind == "heads":
                _tell_heads(model.get_submodule(part.output_name.rsplit(".", 2)[0]), int(kept.sum()))
    return model


def _tell_heads(attention: nn.Module, heads: int) -> None:
    """Correct the numbers that a class of attention keeps beside its matrices, where it has such."""
    for module in attention.modules():
        width = getattr(module, "attention_head_size", None)
        if width is not None:
            module.num_attention_heads = heads  # type: ignore[assignment]
            module.all_head_size = heads * width  # type: ignore[assignment, operator]
