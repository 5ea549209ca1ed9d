"""Preparation: the same bytes from any workers, clear about what is wrong."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from engine.data.store.blocks import split_of
from engine.data.store.executor import open_executor
from engine.data.store.prepare import prepare
from engine.data.store.store import open_store
from engine.data.text.sentences import split_sentences
from engine.errors import UserError
from tests.data.store.corpora import TEXTS, config, content, write_corpus

ROOT = Path(__file__).resolve().parents[3]


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


ONE = "This is the first sentence of the text. This is the second one of it."
TOO_LITTLE: dict[str, tuple[list[str], dict[str, Any], str]] = {
    "empty corpus": ([], {}, "holds no text"),
    "one sentence": (["Only one sentence is here."], {}, "has 1 documents, next-sentence pairs need at least 2"),
    "one document": ([ONE], {}, "has 1 documents, next-sentence pairs need at least 2; .* --objective mlm"),
    "one-sentence documents": (["One here."] * 9, {}, "no document of .* has two sentences"),
    "neither text nor pairs": ([""], {"objective": "mlm"}, "holds no text"),
    "one document of one split": ([ONE], {"objective": "mlm"}, "need at least 3; .* or pass --validation_fraction 0"),
    "another objective": ([ONE] * 9, {"objective": "nsp"}, "objective: 'nsp' is not allowed; choose mlm_nsp or mlm"),
    "three documents": ([ONE] * 3, {}, "need at least 4; give more text or pass --validation_fraction 0"),
    "negative fraction": ([ONE] * 9, {"validation_fraction": -0.5}, r"validation_fraction: -0\.5 is not allowed"),
    "no cores": ([ONE] * 9, {"workers": -1}, "workers: -1 is not allowed"),
    "no field": ([ONE] * 9, {"text_field": "body"}, "text_field: .* has no field 'body'; it has text"),
    "no tokenizer": ([ONE] * 9, {"tokenizer": "./nowhere"}, "tokenizer: nowhere does not exist"),
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


def test_a_single_document_suffices_for_mlm_alone_and_the_objective_is_not_part_of_the_store(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "one.jsonl", [ONE])
    manifest = prepare(config(corpus, tmp_path / "one", validation_fraction=0.0, objective="mlm"))
    assert manifest.counts("train").documents == 1
    several = write_corpus(tmp_path / "several.jsonl", [ONE] * 9)
    stores = [prepare(config(several, tmp_path / name, objective=name)) for name in ("mlm_nsp", "mlm")]
    assert stores[0] == stores[1]
    assert content(tmp_path / "mlm") == content(tmp_path / "mlm_nsp")


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
