"""Who computes what a folder of trained vectors means, to be compared with our modules.

peft has no prefix for the encoders of today's transformers, whose models call a cache otherwise than peft expects, no
forward pass for choices, and one for answers that drops the segments. There transformers' own model gets what peft
makes of the folder.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from engine.model.roundtrip import ON_TOKENS, OUTPUTS

#: heads of which peft doesn't compute a prompt as transformers would
NOT_IN_PEFT = ("multiple_choice", "question_answering")


def judged_by(method: str, head: str, name: str) -> tuple[str, str]:
    """Which model judges, and whose it is.

    Args:
        name: the class of transformers for the head.
    """
    if method == "prefix":
        return f"{name} with the prefix, as peft reads it, for its cache", "transformers'"
    if method == "prompt" and head in NOT_IN_PEFT:
        return f"{name} with the prompt, as peft reads it, before its word embeddings", "transformers'"
    return f"PeftModel over {name}", "peft's"


class VirtualJudge(nn.Module):
    """A PeftModel of a prompt or a prefix as a model of the text's tokens alone."""

    def __init__(self, opened: Any, method: str, head: str) -> None:
        super().__init__()
        self.opened, self.method, self.head = opened, method, head
        self.base: Any = opened.get_base_model()
        self.config = self.base.config

    def forward(self, input_ids: Tensor, token_type_ids: Tensor | None = None) -> SimpleNamespace:
        """Sequences without padding, [B, S], or of choices [1, B, S], to transformers' outputs for them."""
        vectors = self.opened.active_peft_config.num_virtual_tokens
        given = {"input_ids": input_ids}
        if token_type_ids is not None:
            given["token_type_ids"] = token_type_ids
        if self.method == "prefix":
            mask = input_ids.new_ones(*input_ids.shape[:-1], vectors + input_ids.shape[-1])
            cache = self.opened.get_prompt(input_ids.shape[-2])
            output = self.base(**given, attention_mask=mask, past_key_values=cache)
        elif self.head in NOT_IN_PEFT:
            output = self._prompted(given, vectors)
        else:
            output = self.opened(**given)
        behind = vectors if self.method == "prompt" and self.head in ON_TOKENS else 0
        return SimpleNamespace(**{name: getattr(output, name)[:, behind:] for name in OUTPUTS[self.head]})

    def _prompted(self, given: dict[str, Tensor], vectors: int) -> Any:
        words = self.base.get_input_embeddings()(given.pop("input_ids"))
        prompts = self.opened.get_prompt(words.shape[-3]).view(*words.shape[:-2], vectors, -1)
        if "token_type_ids" in given:
            given["token_type_ids"] = nn.functional.pad(given["token_type_ids"], (vectors, 0))
        return self.base(**given, inputs_embeds=torch.cat((prompts, words), -2))
