"""The audit notes what really went into the model, and a later start undoes what lies beyond its checkpoint."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from engine.data.loading.source import Cursor
from engine.errors import RunError
from engine.train.audit import Audit, Entry, Ledger, entries, merge, read_audit, sample_hashes


class Model(nn.Module):
    def forward(self, *, input_ids: Tensor, lengths: Tensor) -> int:
        return len(lengths)


BATCH = {"input_ids": torch.tensor([5, 6, 7, 5, 6]), "lengths": torch.tensor([3, 2])}


def entry(step: int, *samples: str, start: str = "first", ranks: int = 1, resumed: int = 0) -> Entry:
    return Entry(start, ranks, resumed, step, 2 * step, samples)


def test_a_hash_depends_on_the_tokens_of_its_sample_alone() -> None:
    first, second = sample_hashes(**BATCH)
    assert first != second
    assert sample_hashes(torch.tensor([5, 6], dtype=torch.int32), torch.tensor([2])) == [second]
    assert sample_hashes(torch.tensor([5, 6, 5, 6, 7]), torch.tensor([2, 3])) == [second, first]
    assert sample_hashes(torch.tensor([5, 7]), torch.tensor([2])) != [second]


def test_a_step_notes_the_training_batches_that_the_model_was_called_with(tmp_path: Path) -> None:
    model = Model()
    audit = Audit(model, tmp_path, 4, enabled=True)
    model(**BATCH)
    audit.begin_step()  # a step that was abandoned
    model(**BATCH)
    model.eval()
    model(**BATCH)
    model.train()
    model(**BATCH)
    audit.end_step(5, Cursor(1, 2, 20))
    (noted,) = entries((tmp_path / "audit" / "rank-00000.jsonl").read_text())
    assert noted == Entry(noted.start, 1, 4, 5, 20, tuple(2 * sample_hashes(**BATCH)))
    assert read_audit(tmp_path).resumed == {noted.start: 4}


def test_samples_that_go_through_the_model_again_count_once(tmp_path: Path) -> None:
    model = Model()
    audit = Audit(model, tmp_path, 0, enabled=True)
    audit.begin_step()
    twice = {name: torch.cat((tensor, tensor)) for name, tensor in BATCH.items()}
    for _ in range(2):
        model(**twice)
        audit.count(2)
    model(**BATCH)
    audit.count(0)
    audit.end_step(1, Cursor(0, 4, 4))
    (noted,) = entries((tmp_path / "audit" / "rank-00000.jsonl").read_text())
    assert noted.samples == tuple(2 * sample_hashes(**BATCH))


def test_nothing_is_written_unless_it_is_asked_for(tmp_path: Path) -> None:
    model = Model()
    audit = Audit(model, tmp_path, 0, enabled=False)
    audit.begin_step()
    model(**BATCH)
    audit.end_step(1, Cursor(0, 2, 2))
    assert not list(tmp_path.iterdir())
    assert read_audit(tmp_path) == Ledger()


def test_an_audit_that_cannot_be_written_ends_the_run_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "audit").write_text("in the way")
    with pytest.raises(RunError, match=r"^train.audit: .*rank-00000.jsonl can't be written \(File exists\)"):
        Audit(Model(), tmp_path, 0, enabled=True)


def test_a_line_that_a_kill_cut_short_is_left_out_and_the_next_start_begins_a_new_one(tmp_path: Path) -> None:
    path = tmp_path / "audit" / "rank-00000.jsonl"
    path.parent.mkdir()
    whole = json.dumps(asdict(entry(1, "a", "b")))
    path.write_text(f"{whole}\n{whole[:30]}")
    Audit(Model(), tmp_path, 1, enabled=True).end_step(2, Cursor(0, 4, 4))
    assert [one.step for one in entries(path.read_text())] == [1, 2]


def test_a_redone_step_counts_once_and_as_the_later_start_did_it() -> None:
    first = [entry(step, f"{step}") for step in (1, 2, 3, 4)]
    second = [entry(step, f"again {step}", start="second", resumed=2) for step in (3, 4, 5)]
    ledger = merge({0: first + second})
    assert [ledger.steps[step].samples for step in range(1, 6)] == [
        ("1",),
        ("2",),
        ("again 3",),
        ("again 4",),
        ("again 5",),
    ]
    assert ledger.resumed == {"first": 0, "second": 2}


def test_steps_beyond_a_later_starts_checkpoint_are_undone_even_if_nobody_does_them_again() -> None:
    ledger = merge({0: [entry(1, "a"), entry(2, "b"), entry(3, "c"), entry(2, "b", start="second", resumed=1)]})
    assert sorted(ledger.steps) == [1, 2]


def test_ranks_are_joined_start_by_start_whatever_their_number() -> None:
    two = [entry(step, f"{step}", ranks=2) for step in (1, 2, 3)]
    one = entry(3, "3 whole", start="second", resumed=2)
    ledger = merge({1: [replace(other, samples=(f"{other.step}'",)) for other in two], 0: [*two, one]})
    assert [ledger.steps[step].samples for step in (1, 2, 3)] == [("1", "1'"), ("2", "2'"), ("3 whole",)]


def test_a_step_that_a_rank_did_not_note_shows_it() -> None:
    two = [entry(step, f"{step}", ranks=2) for step in (1, 2)]
    assert merge({0: two, 1: two[:1]}).steps[2].silent == (1,)
    assert merge({0: two[:1], 1: two}).steps[2].silent == (0,)
    assert merge({0: two}).steps[1].silent == (1,)
    assert merge({1: two}) == Ledger()


def test_a_start_that_goes_back_to_a_checkpoint_undoes_what_it_passed() -> None:
    there_and_back = [entry(1, "a"), entry(2, "b"), entry(3, "c"), entry(2, "d"), entry(3, "e")]
    assert [step.samples for step in merge({0: there_and_back}).steps.values()] == [("a",), ("d",), ("e",)]
