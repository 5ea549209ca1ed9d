"""Preparation: the same bytes from any workers, safe to kill, clear about what is wrong."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from engine.data.store.blocks import split_of
from engine.data.store.executor import InlineExecutor, open_executor
from engine.data.store.manifest import MANIFEST_NAME
from engine.data.store.prepare import PrepareConfig, prepare
from engine.data.store.store import open_store
from engine.data.text.embedded import embedded_documents
from engine.data.text.sentences import split_sentences
from engine.data.tokenizer.given import Given
from engine.data.tokenizer.wordpiece import SPECIAL_TOKENS, Vocabulary, load_tokenizer, train_wordpiece
from engine.errors import UserError

ROOT = Path(__file__).resolve().parents[3]
TEXTS = list(embedded_documents()[:60])


def write_corpus(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_corpus(tmp_path / "corpus.jsonl", TEXTS)


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut blocks after 40 kB, so that a small corpus has several."""
    monkeypatch.setattr("engine.data.store.blocks.MEGABYTE", 40_000)


def config(source: Path, output: Path, **options: Any) -> PrepareConfig:
    return PrepareConfig(
        **{"vocab_size": 600, "shard_mb": 1, "source": [str(source)], "output": str(output), **options}
    )


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class KilledExecutor(Executor):
    """Runs `alive` blocks and then behaves as if the process were interrupted."""

    def __init__(self, alive: int) -> None:
        self.alive, self.inner = alive, InlineExecutor()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        if self.alive == 0:
            raise KeyboardInterrupt
        self.alive -= 1
        return self.inner.submit(fn, *args, **kwargs)


def test_the_store_holds_every_sentence_of_the_corpus(corpus: Path, tmp_path: Path) -> None:
    manifest = prepare(config(corpus, tmp_path / "store"))
    store = open_store(tmp_path / "store", verify=True)
    words = store.tokenizer
    expected = {"train": [], "validation": []}  # type: dict[str, list[list[int]]]
    for ordinal, text in enumerate(TEXTS):
        expected[split_of(ordinal, 0.01, 1)] += words.encode_batch(split_sentences(text))
    for name, sentences in expected.items():
        split = store.split(name)
        assert split.sentence_lengths.tolist() == [len(ids) for ids in sentences]
        starts = [0]
        for ids in sentences:
            assert split.tokens(starts[-1], len(ids)).tolist() == ids
            starts.append(starts[-1] + len(ids))
    assert manifest.counts("validation").documents >= 2
    assert manifest.sources[0].bytes == corpus.stat().st_size


@pytest.mark.usefixtures("small_shards")
def test_the_bytes_do_not_depend_on_the_workers(corpus: Path, tmp_path: Path) -> None:
    prepare(config(corpus, tmp_path / "inline"))
    with open_executor(2) as opened:
        assert opened is not None
        prepare(config(corpus, tmp_path / "pool"), *opened)
    assert len(list((tmp_path / "inline").glob("train-*.arrow"))) > 3
    assert content(tmp_path / "inline") == content(tmp_path / "pool")


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "launch", "prepare", *map(str, arguments)]


def test_mpi_ranks_make_the_same_store(corpus: Path, tmp_path: Path) -> None:
    beside = Path(sys.executable).with_name("mpirun")
    mpirun = str(beside) if beside.exists() else shutil.which("mpirun")
    if mpirun is None:
        pytest.skip("mpirun is not installed")
    options = ("--source", corpus, "--vocab_size", 600, "--output")
    launcher = [mpirun, "--allow-run-as-root", "--oversubscribe", "-n", "3"]
    subprocess.run([*launcher, *command(*options, tmp_path / "mpi")], cwd=ROOT, check=True, capture_output=True)
    prepare(config(corpus, tmp_path / "inline", shard_mb=8))
    assert content(tmp_path / "mpi") == content(tmp_path / "inline")
    failed = subprocess.run(
        [*launcher, *command(*options, tmp_path / "other", "--shard_mb", 0)], cwd=ROOT, capture_output=True, text=True
    )
    assert failed.returncode == 2
    assert failed.stderr.count("error: shard_mb: 0 is not allowed") == 1


@pytest.mark.usefixtures("small_shards")
def test_a_killed_run_leaves_no_store_and_the_next_goes_on(corpus: Path, tmp_path: Path) -> None:
    output = tmp_path / "store"
    with pytest.raises(KeyboardInterrupt):
        prepare(config(corpus, output), KilledExecutor(3))
    with pytest.raises(UserError, match="is no complete store"):
        open_store(output)
    finished = {path.name: path.stat().st_mtime_ns for path in (output / ".partial").glob("train-*.arrow")}
    assert len(finished) == 3

    prepare(config(corpus, output))
    assert {name: (output / name).stat().st_mtime_ns for name in finished} == finished
    prepare(config(corpus, tmp_path / "fresh"))
    assert content(output) == content(tmp_path / "fresh")


@pytest.mark.usefixtures("small_shards")
def test_a_damaged_shard_of_a_killed_run_is_made_again(corpus: Path, tmp_path: Path) -> None:
    output = tmp_path / "store"
    with pytest.raises(KeyboardInterrupt):
        prepare(config(corpus, output), KilledExecutor(2))
    (output / ".partial" / "train-00000.arrow").write_bytes(b"cut")
    (output / ".partial" / "train-00001.arrow").unlink()
    prepare(config(corpus, output))
    open_store(output, verify=True)


def test_a_killed_run_with_other_settings_is_refused_or_overwritten(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        prepare(config(corpus, tmp_path / "store"), KilledExecutor(0))
    with pytest.raises(UserError, match=r"seed: .* was prepared with 1, not 2; pass --overwrite"):
        prepare(config(corpus, tmp_path / "store", seed=2))
    prepare(config(corpus, tmp_path / "store", seed=2, overwrite=True))
    assert open_store(tmp_path / "store").manifest.settings["seed"] == 2


def test_a_finished_store_is_not_made_again(corpus: Path, tmp_path: Path) -> None:
    manifest = prepare(config(corpus, tmp_path / "store"))
    before = content(tmp_path / "store")
    moved = corpus.rename(tmp_path / "moved.jsonl")
    assert prepare(config(moved, tmp_path / "store"), KilledExecutor(0)) == manifest
    assert content(tmp_path / "store") == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_size": 500}, r"vocab_size: .* was prepared with 600, not 500; pass --overwrite"),
        ({"lowercase": False}, r"lowercase: .* was prepared with True, not False"),
        ({"shard_mb": 2}, r"shard_mb: .* was prepared with 1, not 2"),
    ],
)
def test_another_setting_is_refused_by_name(
    corpus: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    prepare(config(corpus, tmp_path / "store"))
    before = content(tmp_path / "store")
    with pytest.raises(UserError, match=message):
        prepare(config(corpus, tmp_path / "store", **options))
    assert content(tmp_path / "store") == before


def test_other_text_is_refused_and_overwrite_replaces_it(corpus: Path, tmp_path: Path) -> None:
    prepare(config(corpus, tmp_path / "store"))
    other = write_corpus(tmp_path / "other.jsonl", TEXTS[:30])
    with pytest.raises(UserError, match=r"source: .* was prepared with other content; pass --overwrite"):
        prepare(config(other, tmp_path / "store"))
    prepare(config(other, tmp_path / "store", overwrite=True))
    prepare(config(other, tmp_path / "fresh"))
    assert content(tmp_path / "store") == content(tmp_path / "fresh")


def test_a_failed_overwrite_keeps_the_old_store(corpus: Path, tmp_path: Path) -> None:
    prepare(config(corpus, tmp_path / "store"))
    before = content(tmp_path / "store")
    bad = tmp_path / "bad.jsonl"
    bad.write_bytes(corpus.read_bytes() + b"{\n")
    with pytest.raises(UserError, match=r"bad\.jsonl:61: not JSON"):
        prepare(config(bad, tmp_path / "store", overwrite=True))
    assert content(tmp_path / "store") == before


def test_a_given_tokenizer_is_used_and_pinned(corpus: Path, tmp_path: Path) -> None:
    first = prepare(config(corpus, tmp_path / "first"))
    given = {"tokenizer": str(tmp_path / "first" / "tokenizer")}
    second = prepare(config(corpus, tmp_path / "second", **given))
    assert second.fingerprint == first.fingerprint
    assert second.settings["tokenizer"] == first.tokenizer_fingerprint
    with pytest.raises(UserError, match=r"tokenizer: .* was prepared with"):
        prepare(config(corpus, tmp_path / "first", **given))


@pytest.fixture
def given(tmp_path: Path) -> Path:
    """A tokenizer of the first half of the texts, 600 tokens, lowercasing."""
    train_wordpiece(TEXTS[:30], tmp_path / "given", 600)
    return tmp_path / "given"


def test_special_tokens_are_added_to_a_given_tokenizer(given: Path, tmp_path: Path) -> None:
    texts = [f"{text} Signed by [NAME] of [DEID]." for text in TEXTS[:20]]
    corpus = write_corpus(tmp_path / "corpus.jsonl", texts)
    options = {"vocab_size": None, "tokenizer": str(given), "special_tokens": ["[DEID]", "[CLS]", "[NAME]"]}
    manifest = prepare(config(corpus, tmp_path / "store", **options))
    store = open_store(tmp_path / "store")
    assert store.tokenizer.tokens == [*load_tokenizer(given).tokens, "[DEID]", "[NAME]"]
    assert manifest.vocab_size == 602
    train = store.split("train")
    tokens = train.tokens(0, int(train.sentence_lengths[: train.document_starts[1]].sum())).tolist()
    assert (tokens.count(600), tokens.count(601)) == (1, 1)
    with pytest.raises(UserError, match=r"tokenizer: .* was prepared with"):
        prepare(config(corpus, tmp_path / "store", **options | {"special_tokens": []}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"vocab_size": 999},
            r"^vocab_size: 999 is not allowed; the tokenizer .* has 600 tokens: leave the option out",
        ),
        ({"lowercase": False}, r"^lowercase: False is not allowed; the tokenizer .* lowercases: leave the option out"),
        ({"sample_mb": 7}, r"^sample_mb: 7 is not allowed beside tokenizer"),
        ({"special_tokens": ["two words"]}, r"^special_tokens: 'two words' is not allowed"),
    ],
)
def test_an_option_that_a_given_tokenizer_contradicts_is_refused(
    corpus: Path, given: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        prepare(config(corpus, tmp_path / "store", **{"vocab_size": None, "tokenizer": str(given)} | options))
    assert not (tmp_path / "store").exists()


def test_options_that_agree_with_a_given_tokenizer_are_taken(corpus: Path, given: Path, tmp_path: Path) -> None:
    prepare(config(corpus, tmp_path / "store", tokenizer=str(given), vocab_size=600, lowercase=True))
    bare = config(corpus, tmp_path / "cased", tokenizer=str(given / "vocab.txt"), lowercase=False, vocab_size=None)
    (given / "tokenizer_config.json").unlink()
    prepare(bare)
    assert not open_store(tmp_path / "cased").tokenizer.lowercase


def test_a_tokenizer_that_transformers_reads_otherwise_is_refused(given: Path) -> None:
    """What no reader of ours explains shows on the user's own text, before anything is written."""
    ours = load_tokenizer(given)
    state = json.loads(ours.backend.to_str())
    state["pre_tokenizer"] = {"type": "WhitespaceSplit"}
    other = Vocabulary(Tokenizer.from_str(json.dumps(state)))
    with pytest.raises(UserError, match=r"^tokenizer: .*: the text 'Say, this' is 's .*' for transformers.* '.*' here"):
        Given(given, other, other, None).compare(["plain words", "Say, this"])
    Given(given, ours, ours, None).compare(["plain words", "Say, this"])


def test_the_share_of_unknown_pieces_is_counted_and_bounded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    vocab = [*SPECIAL_TOKENS, "one", "two", "."]
    (tmp_path / "vocab.txt").write_text("".join(f"{token}\n" for token in vocab))
    corpus = write_corpus(tmp_path / "corpus.jsonl", ["one two. two xyz.", "one two. one two."] * 4)
    options = {"tokenizer": str(tmp_path / "vocab.txt"), "vocab_size": None}
    caplog.set_level("INFO")
    manifest = prepare(config(corpus, tmp_path / "store", **options))
    assert sum(manifest.counts(split).unknown or 0 for split in manifest.splits) == 4
    assert sum(manifest.counts(split).tokens for split in manifest.splits) == 48
    assert "% [UNK])" in caplog.text
    with pytest.raises(UserError, match=r"^max_unknown_share: 8\.3% of the 48 word pieces of the first documents are"):
        prepare(config(corpus, tmp_path / "other", max_unknown_share=0.08, **options))
    assert not (tmp_path / "other").exists()
    strange = write_corpus(tmp_path / "strange.jsonl", ["alpha beta. gamma."] * 8)
    with pytest.raises(UserError, match=r"more than 20\.0%; give a tokenizer that was made for this text, or raise"):
        prepare(config(strange, tmp_path / "other", **options))
    prepare(config(strange, tmp_path / "other", max_unknown_share=1.0, **options))


def test_unknown_pieces_after_the_first_documents_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.data.tokenizer.check.SAMPLE_TEXTS", 2)
    (tmp_path / "vocab.txt").write_text("".join(f"{token}\n" for token in [*SPECIAL_TOKENS, "one", "."]))
    corpus = write_corpus(tmp_path / "corpus.jsonl", ["one one. one."] * 2 + ["alpha beta. gamma."] * 8)
    options = {"tokenizer": str(tmp_path / "vocab.txt"), "vocab_size": None}
    with pytest.raises(UserError, match=r"^max_unknown_share: .*corpus\.jsonl are \[UNK\]"):
        prepare(config(corpus, tmp_path / "store", **options))
    assert not (tmp_path / "store").exists()


def test_a_folder_of_other_files_is_left_alone(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(UserError, match=r"output: .* holds other files, e\.g\. thesis\.txt"):
            prepare(config(corpus, tmp_path / "mine", overwrite=overwrite))
    assert content(tmp_path / "mine") == {"thesis.txt": b"precious"}


def test_two_preparations_of_one_folder_exclude_each_other(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "store" / ".partial").mkdir(parents=True)
    with (tmp_path / "store" / ".partial" / "lock").open("w") as lock:
        lock.write("process 17 on node3")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="is being prepared by process 17 on node3; wait for it"):
            prepare(config(corpus, tmp_path / "store"))
    prepare(config(corpus, tmp_path / "store"))


def test_a_dead_worker_is_explained_and_the_next_run_goes_on(corpus: Path, tmp_path: Path) -> None:
    with open_executor(2) as opened:
        assert opened is not None
        opened[0].submit(os._exit, 1)
        with pytest.raises(UserError, match="workers: a worker process died"):
            prepare(config(corpus, tmp_path / "store"), *opened)
    prepare(config(corpus, tmp_path / "store"))


ONE = "This is the first sentence of the text. This is the second one of it."
TOO_LITTLE: dict[str, tuple[list[str], dict[str, Any], str]] = {
    "empty corpus": ([], {}, "holds no text"),
    "one sentence": (["Only one sentence is here."], {}, "has 1 documents, next-sentence pairs need at least 2"),
    "one document": ([ONE], {}, "has 1 documents, next-sentence pairs need at least 2"),
    "one-sentence documents": (["One here."] * 9, {}, "no document of .* has two sentences"),
    "three documents": ([ONE] * 3, {}, "need at least 4; give more text or pass --validation_fraction 0"),
    "negative fraction": ([ONE] * 9, {"validation_fraction": -0.5}, r"validation_fraction: -0\.5 is not allowed"),
    "no cores": ([ONE] * 9, {"workers": -1}, "workers: -1 is not allowed"),
    "no field": ([ONE] * 9, {"text_field": "body"}, "text_field: .* has no field 'body'; it has text"),
    "no tokenizer": ([ONE] * 9, {"tokenizer": "nowhere"}, "tokenizer: nowhere does not exist"),
}


@pytest.mark.parametrize("case", TOO_LITTLE)
def test_a_user_error_leaves_nothing_behind(tmp_path: Path, case: str) -> None:
    texts, options, message = TOO_LITTLE[case]
    corpus = write_corpus(tmp_path / "corpus.jsonl", texts)
    with pytest.raises(UserError, match=message):
        prepare(config(corpus, tmp_path / "new" / "store", **options))
    assert list(tmp_path.iterdir()) == [corpus]


def test_few_documents_suffice_without_a_held_out_split(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus.jsonl", [ONE, ONE])
    manifest = prepare(config(corpus, tmp_path / "store", validation_fraction=0.0))
    assert manifest.counts("train").documents == 2
    assert manifest.splits["validation"] == []


def test_half_a_surrogate_pair_is_left_out(tmp_path: Path) -> None:
    """Web crawls cut JSON strings in the middle of an escaped emoji."""
    texts = [f"{ONE} More \ud83d of it. \U0001f600 \\udead"] * 4
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*texts, "\ud83d"]), encoding="ascii")
    manifest = prepare(config(corpus, tmp_path / "store"))
    assert sum(manifest.counts(split).documents for split in manifest.splits) == 4
    clean = write_corpus(tmp_path / "clean.jsonl", [text.replace("\ud83d", "") for text in texts])
    assert prepare(config(clean, tmp_path / "clean")).fingerprint == manifest.fingerprint


def test_four_documents_are_halved() -> None:
    for seed in range(20):
        assert sorted(split_of(i, 0.01, seed) for i in range(4)) == ["train"] * 2 + ["validation"] * 2


def test_the_held_out_share_is_the_fraction_asked() -> None:
    held_out = sum(split_of(i, 0.05, seed=3) == "validation" for i in range(20_000))
    assert abs(held_out - 1000) < 4 * (20_000 * 0.05 * 0.95) ** 0.5


def test_the_command_prepares_several_sources(corpus: Path, tmp_path: Path) -> None:
    more = write_corpus(tmp_path / "more.jsonl", TEXTS[:5])
    options = ("--source", corpus, more, "--vocab_size", 600, "--workers", 0, "--output", tmp_path / "store")
    done = subprocess.run(command(*options), cwd=ROOT, check=True, capture_output=True, text=True)
    assert "train " in done.stdout
    manifest = open_store(tmp_path / "store").manifest
    assert sum(manifest.counts(split).documents for split in manifest.splits) == len(TEXTS) + 5
    again = subprocess.run(command(*options), cwd=ROOT, check=True, capture_output=True, text=True)
    assert "is already prepared" in again.stdout


def test_preparing_imports_no_slow_library(corpus: Path, tmp_path: Path) -> None:
    """A small corpus takes less time than torch or `datasets` to import."""
    arguments = ["--source", str(corpus), "--vocab_size", "600", "--workers", "0", "--output", str(tmp_path / "store")]
    code = f"import sys, launch.prepare; launch.prepare.main({arguments}); import engine.data.store.store"
    code += "; sys.exit(str({'torch', 'datasets', 'transformers', 'pandas'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr.strip() == "set()"


def test_a_store_is_complete_only_with_its_manifest(corpus: Path, tmp_path: Path) -> None:
    """Killed while files are moved into place: the next run makes a whole store."""
    output = tmp_path / "store"
    manifest = prepare(config(corpus, output))
    before = content(output)
    (output / ".partial").mkdir()
    (output / MANIFEST_NAME).unlink()
    assert prepare(config(corpus, output)) == manifest
    assert content(output) == before


def test_sources_can_be_numbered_instead_of_named(tmp_path: Path) -> None:
    folder = tmp_path / "patient_jane_doe"
    folder.mkdir()
    for index in range(2):
        write_corpus(folder / f"visit-{index}.jsonl", TEXTS[30 * index : 30 * index + 30])
    named = prepare(config(folder, tmp_path / "named"))
    numbered = prepare(config(folder, tmp_path / "numbered", source_names=False))
    assert [Path(source.name).name for source in named.sources] == ["visit-0.jsonl", "visit-1.jsonl"]
    assert [source.name for source in numbered.sources] == ["source-1", "source-2"]
    assert [source.sha256 for source in numbered.sources] == [source.sha256 for source in named.sources]
    assert numbered.fingerprint == named.fingerprint
    assert any(b"jane_doe" in data for data in content(tmp_path / "named").values())
    assert not any(b"jane_doe" in data or b"visit" in data for data in content(tmp_path / "numbered").values())


def test_a_store_with_names_is_no_answer_to_who_wants_none(corpus: Path, tmp_path: Path) -> None:
    prepare(config(corpus, tmp_path / "store"))
    with pytest.raises(UserError, match=r"^source_names: .* was prepared with None, not False; pass --overwrite"):
        prepare(config(corpus, tmp_path / "store", source_names=False))
    prepare(config(corpus, tmp_path / "store", source_names=False, overwrite=True))
    assert not any(b"corpus.jsonl" in data for data in content(tmp_path / "store").values())
    assert prepare(config(corpus, tmp_path / "store", source_names=False)).sources[0].name == "source-1"
