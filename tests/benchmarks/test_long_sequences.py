"""Memory of long sequences: a token takes as much at 8,192 tokens as at 1,024."""

from __future__ import annotations

import pytest

from benchmarks.long_sequences import GLOBAL, KERNELS, LENGTHS, measure


@pytest.mark.slow
@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("every", GLOBAL.values(), ids=GLOBAL)
def test_memory_a_token_does_not_grow_with_the_length(every: int, kernels: str) -> None:
    """Not even in global layers, whose scores alone would be 32 KiB a token and head at 8,192 tokens in fp32."""
    found = measure(LENGTHS, every, kernels, max(LENGTHS))
    print(f"{every}, {kernels}: {found}")
    assert max(found.values()) < 1.02 * min(found.values())


@pytest.mark.slow
def test_scores_of_all_tokens_are_never_there() -> None:
    """What `test_memory_a_token_does_not_grow_with_the_length` shows, of shorter sequences in seconds."""
    found = measure((256, 1024), 3, "auto", 1024)
    assert found[1024] < 1.02 * found[256]
