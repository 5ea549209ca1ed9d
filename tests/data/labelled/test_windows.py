"""Windows over long texts: every piece is shown, and told by the window that shows most around it."""

from __future__ import annotations

import doctest
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from engine.data.labelled import windows as module
from engine.data.labelled.windows import best_seen, windows


@st.composite
def cuts(draw: st.DrawFn) -> tuple[int, int, int]:
    """Pieces, room and overlap."""
    room = draw(st.integers(1, 20))
    return draw(st.integers(0, 120)), room, draw(st.integers(0, room - 1))


@given(cuts())
def test_windows_cover_every_piece_in_order(cut: tuple[int, int, int]) -> None:
    count, room, overlap = cut
    found = windows(count, room, overlap)
    assert found[0][0] == 0
    assert found[-1][1] == count
    assert all(stop - start == min(count, room) for start, stop in found)
    for (start, stop), (following, _) in pairwise(found):
        assert start < following
        assert stop - following >= overlap
    assert all(stop - following == overlap for (_, stop), (following, _) in pairwise(found[:-1]))
    assert len(found) == 1 or len(found) == 1 + -(-(count - room) // (room - overlap))


@given(cuts())
def test_each_piece_is_told_where_most_is_seen_around_it(cut: tuple[int, int, int]) -> None:
    found = windows(*cut)
    chosen = best_seen(cut[0], found)
    assert len(chosen) == cut[0]
    assert chosen == sorted(chosen)
    for piece, window in enumerate(chosen):
        shown = {i: min(piece - a, b - 1 - piece) for i, (a, b) in enumerate(found) if a <= piece < b}
        assert shown[window] == max(shown.values())
        assert window == min(index for index, least in shown.items() if least == shown[window])


def test_the_examples_hold() -> None:
    assert doctest.testmod(module).failed == 0
