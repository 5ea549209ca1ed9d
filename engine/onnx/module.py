"""An ONNX folder as a module: it takes packed batches and gives packed logits, as our own models with a head do.

onnxruntime computes on padded batches. What is padded here is taken away again before the logits are given back, so
that a predictor, or the evaluation of a task, takes such a model as any other.

Shape legend: B sequences, T tokens in all of them, S tokens in the longest, C classes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine.errors import UserError, first_line
from engine.model.packing import Packing
from engine.model.pretrained import ONNX_FILE
from engine.onnx.graph import output_names

INSTALL = "pip install 'zerobert[onnx]'"
#: of onnxruntime, where it has one for GPUs
ON_GPU = "CUDAExecutionProvider"


def runtime() -> Any:
    """The package onnxruntime.

    Raises:
        UserError: it isn't installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise UserError(f"model: an ONNX folder needs onnxruntime, which is not installed; {INSTALL}") from error
    return onnxruntime


def place(wanted: str, device: torch.device) -> torch.device:
    """Where a graph is computed: on the CPU where onnxruntime can't use a GPU.

    Args:
        wanted: what the user said: "auto", "cpu" or "cuda".
        device: what that means for torch.

    Raises:
        UserError: a GPU is wanted that onnxruntime can't use.
    """
    if device.type == "cpu" or ON_GPU in runtime().get_available_providers():
        return device
    if wanted == "cuda":
        remedy = "give cpu, or install onnxruntime-gpu in the place of onnxruntime"
        raise UserError(f"device: 'cuda' is not allowed; this onnxruntime has no {ON_GPU}: {remedy}")
    return torch.device("cpu")


def open_session(graph: Path | bytes, device: torch.device, threads: int | None = None) -> Any:
    """A graph that is ready to compute.

    Args:
        graph: the file, or its content.
        threads: of an operator; None: as many as torch has.

    Raises:
        UserError: no ONNX graph, or one that this onnxruntime can't compute.
    """
    library = runtime()
    options = library.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    options.log_severity_level = 3  # its warnings are of graphs in general
    providers: list[Any] = [] if device.type == "cpu" else [(ON_GPU, {"device_id": device.index or 0})]
    try:
        given = graph if isinstance(graph, bytes) else str(graph)
        return library.InferenceSession(given, options, providers=[*providers, "CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors have no class in common but this
        where = "the graph" if isinstance(graph, bytes) else graph
        raise UserError(f"{where}: onnxruntime can't open it ({first_line(error)}); export it again") from error


class OnnxModule(nn.Module):
    """A graph under one of our heads, in evaluation mode whatever it is told."""

    def __init__(self, session: Any, head: str, config: Any) -> None:
        """Args:
        session: see `open_session`.
        head: one of `Architecture.export_classes`.
        config: the transformers configuration beside the graph.
        """
        super().__init__()
        self.session, self.head, self.config = session, head, config
        self._inputs = {each.name for each in session.get_inputs()}
        self._padding: int = config.pad_token_id or 0

    @classmethod
    def opened(
        cls, folder: Path, head: str, config: Any, device: torch.device, threads: int | None = None
    ) -> OnnxModule:
        """The graph of an ONNX folder.

        Raises:
            UserError: see `open_session`; or the graph is not that of the head.
        """
        session = open_session(folder / ONNX_FILE, device, threads)
        given = [each.name for each in session.get_outputs()]
        lacking = [name for name in output_names(head) if name not in given]
        if lacking:
            raise UserError(
                f"{folder / ONNX_FILE}: it has outputs {', '.join(given)} and a model for {head} has {lacking[0]}; "
                "give the folder as zerobert export --format onnx writes it"
            )
        return cls(session, head, config)

    def forward(
        self,
        input_ids: Tensor,
        token_type_ids: Tensor,
        position_ids: Tensor,
        lengths: Tensor,
        max_length: int | None = None,
        read: Tensor | None = None,
    ) -> Tensor:
        """Compute a packed batch.

        Args:
            input_ids, token_type_ids: [T].
            position_ids: not read: the graph counts for itself.
            lengths: [B], which add up to T.
            max_length: S, where it is known.
            read: [R] int64, the tokens whose logits are wanted; all if absent.

        Returns:
            As our heads: fp32 [B, C], or [R, C] of heads on tokens; of embeddings vectors [B, H].
        """
        packing = Packing.from_lengths(lengths, len(input_ids), max_length)
        if self.head == "embeddings":
            return self._run(("sentence_embedding",), packing, input_ids, token_type_ids)
        if self.head not in ("token_classification", "question_answering"):
            return self._run(("logits",), packing, input_ids, token_type_ids)
        grid = self._run(output_names(self.head), packing, input_ids, token_type_ids)
        logits = packing.from_grid(grid, len(input_ids))
        return logits if read is None else logits[read]

    def states(self, input_ids: Tensor, token_type_ids: Tensor, lengths: Tensor, **_: Any) -> Tensor:
        """The last states [T, H] of a packed batch, of a model of embeddings."""
        packing = Packing.from_lengths(lengths, len(input_ids))
        return packing.from_grid(self._run(("token_embeddings",), packing, input_ids, token_type_ids), len(input_ids))

    def _run(self, names: tuple[str, ...], packing: Packing, ids: Tensor, segments: Tensor) -> Tensor:
        """The outputs of these names, fp32; several, which are [B, S], side by side."""
        grids = {
            "input_ids": packing.to_grid(ids - self._padding) + self._padding,
            "attention_mask": packing.to_grid(torch.ones_like(ids)),
            "token_type_ids": packing.to_grid(segments),
        }
        options = self.head == "multiple_choice"  # each sequence is a question of one option
        given = {
            name: (grid[:, None] if options else grid).cpu().numpy()
            for name, grid in grids.items()
            if name in self._inputs
        }
        found = [torch.from_numpy(values).to(ids.device) for values in self.session.run(list(names), given)]
        return found[0].float() if len(found) == 1 else torch.stack(found, dim=-1).float()
