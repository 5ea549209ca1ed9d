"""Long texts in overlapping windows: a model sees one after the other, and each piece in at least one of them."""

from __future__ import annotations


def windows(count: int, room: int, overlap: int) -> list[tuple[int, int]]:
    """Where windows of at most `room` of `count` pieces start and stop, in order.

    The last one ends with the last piece and has as many as there is room for, so it may overlap more than the others.

    >>> windows(10, 4, 1)
    [(0, 4), (3, 7), (6, 10)]
    >>> windows(11, 4, 1)
    [(0, 4), (3, 7), (6, 10), (7, 11)]
    >>> windows(3, 4, 1)
    [(0, 3)]

    Args:
        count: pieces of the text; 0 gives one empty window.
        overlap: pieces that follow each other's start and end share, less than `room`.
    """
    assert 0 <= overlap < room
    if count <= room:
        return [(0, count)]
    starts = [*range(0, count - room, room - overlap), count - room]
    return [(start, start + room) for start in starts]


def best_seen(count: int, given: list[tuple[int, int]]) -> list[int]:
    """By piece the window that shows most around it, measured on its barer side; the earlier of two equal ones.

    >>> best_seen(10, windows(10, 4, 2))
    [0, 0, 0, 1, 1, 2, 2, 3, 3, 3]
    """
    best, shown = [0] * count, [-1] * count
    for index, (start, stop) in enumerate(given):
        for piece in range(start, stop):
            if min(piece - start, stop - 1 - piece) > shown[piece]:
                best[piece], shown[piece] = index, min(piece - start, stop - 1 - piece)
    return best
