"""A checkpoint says what its weights mean: exports need nothing else, and resumes are held to it."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, BertForPreTraining

from engine.config import LabelledConfig, ModelConfig, RunConfig, TrainConfig
from engine.data.store.prepare import PrepareConfig, prepare
from engine.data.tokenizer.wordpiece import SPECIAL_TOKENS, load_tokenizer
from engine.errors import UserError
from engine.tasks.pretrain import Pretraining
from engine.tasks.sequence import SequenceClassification
from engine.train.best import of_state, regain
from engine.train.checkpoint.folder import RunState, complete_checkpoints, read_state
from engine.train.start import is_over, recorded_facts
from launch.export import main as export
from tests.data.store.corpora import TEXTS, write_corpus
from tests.train.runs import run

WORDS = ["good", "bad", "awful", "the", "film", "was", "a", "cat"]
CLASSES = ("negative", "neutral", "positive")


def write_examples(path: Path, count: int, shift: int = 0) -> None:
    """Texts of which the first word tells the class."""
    rows = [(WORDS[i % 3], " ".join(WORDS[3 + (i * 7 + j + shift) % 5] for j in range(4))) for i in range(count)]
    lines = [f"{word} {text},{CLASSES[WORDS.index(word)]}" for word, text in rows]
    path.write_text("\n".join(["sentence,label", *lines]) + "\n")


def write_model(folder: Path, words: list[str]) -> None:
    folder.mkdir()
    (folder / "vocab.txt").write_text("".join(f"{word}\n" for word in (*SPECIAL_TOKENS, *words)))
    load_tokenizer(folder / "vocab.txt").save(folder)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    torch.manual_seed(0)
    BertForPreTraining(BertConfig(vocab_size=13, max_position_embeddings=64, **sizes)).save_pretrained(folder)


def configuration(folder: Path, steps: int = 16) -> RunConfig:
    labelled = LabelledConfig(str(folder / "train.csv"), test=str(folder / "test.csv"), max_length=16)
    model = ModelConfig(init_from=str(folder / "bert"))
    train = TrainConfig(global_batch=16, steps=steps)
    return RunConfig("sequence_classification", str(folder / "run"), model=model, labelled=labelled, train=train)


def options(folder: Path, steps: int = 16) -> list[str]:
    return [
        "--task=sequence_classification",
        f"--model.init_from={folder / 'bert'}",
        f"--labelled.train={folder / 'train.csv'}",
        f"--labelled.test={folder / 'test.csv'}",
        "--labelled.max_length=16",
        "--optim.learning_rate=0.003",
        "--train.zero_stage=1",
        f"--train.steps={steps}",
        "--train.eval_interval=4",
    ]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, a model, and a finished run on them."""
    folder = tmp_path_factory.mktemp("meaning")
    write_examples(folder / "train.csv", 90)
    write_examples(folder / "test.csv", 30, shift=2)
    write_model(folder / "bert", WORDS)
    printed = run(folder / "run", *options(folder))
    assert "taken: embeddings (5), encoder layers 0 to 1 (32), pooler (2); newly initialised: classifier (2)" in printed
    return folder


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    """A copy of it, to be changed."""
    return shutil.copytree(finished, tmp_path / "copy")


def start_of(folder: Path) -> Path:
    return complete_checkpoints(folder / "run" / "checkpoints")[-1]


def content(folder: Path) -> dict[str, str]:
    """Hashes of all files below a folder."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def origin_of(folder: Path) -> dict[str, Any]:
    """What an export tells of itself."""
    values: dict[str, Any] = json.loads((folder / "zerobert.json").read_text())
    return values


def refuse(folder: Path, pattern: str, config: RunConfig | None = None) -> None:
    config = config or configuration(folder)
    with pytest.raises(UserError, match=pattern):
        recorded_facts(SequenceClassification(config), config, start_of(folder))


def test_an_export_needs_the_checkpoint_alone(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data and base model are gone, and the command runs elsewhere."""
    alone = shutil.copytree(start_of(finished), tmp_path / "step-000016")
    monkeypatch.chdir(tmp_path)
    assert export(["step-000016", "--output", "model"]) == 0
    model = AutoModelForSequenceClassification.from_pretrained("model")
    assert model.config.id2label == dict(enumerate(CLASSES))
    assert model.config.problem_type == "single_label_classification"
    tokenizer = AutoTokenizer.from_pretrained("model")
    assert tokenizer("good cat")["input_ids"] == [2, 5, 12, 3]
    origin = json.loads((tmp_path / "model" / "zerobert.json").read_text())
    assert (origin["step"], origin["facts"]["classes"]) == (16, list(CLASSES))
    assert (alone / "config.json").is_file()


def test_the_best_and_the_last_weights_are_both_offered(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    best = origin_of(finished / "run" / "export")["best"]
    assert export([str(finished / "run"), "--output", str(tmp_path / "best")]) == 0
    told = f"the best accuracy, {best['value']:.4f} at step {best['step']}"
    assert told in capsys.readouterr().out
    assert export([str(finished / "run"), "--weights=last", "--output", str(tmp_path / "last")]) == 0
    assert "step-000016" in capsys.readouterr().out
    copied, own = (origin_of(folder) for folder in (tmp_path / "best", finished / "run" / "export"))
    assert copied | {"round_trip": None} == own | {"round_trip": None}
    copied, own = (content(folder) for folder in (tmp_path / "best", finished / "run" / "export"))
    assert copied | {"zerobert.json": ""} == own | {"zerobert.json": ""}
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("best", "last"))
    assert best["step"] < 16
    assert any(not torch.equal(ours[name], theirs[name]) for name in ours)


def test_exports_tell_what_they_were_compared_on(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run's own has its held-out examples; the command has no data, and compares unless it is told not to."""
    own = origin_of(finished / "run" / "export")["round_trip"]
    assert (own["judge"], own["samples"], own["of_data"]) == ("BertForSequenceClassification", 4, True)
    assert own["differences"]["logits"] < own["bound"]
    judge = r"transformers' BertForSequenceClassification"
    for given, told in (([], judge), (["--check"], judge), (["--check=false"], "nothing, as --check false says")):
        assert export([str(start_of(finished)), "--output", str(tmp_path / "model"), *given]) == 0
        line = capsys.readouterr().out.splitlines()[-1]
        assert line.startswith("checked: ")
        assert told in line
        compared = origin_of(tmp_path / "model")["round_trip"]
        assert (compared is None) == (given == ["--check=false"])
        assert compared is None or (compared["of_data"], compared["samples"]) == (False, 3)
    with pytest.raises(UserError, match=r"^check: 'maybe' is not allowed; give true or false"):
        export([str(start_of(finished)), "--output", str(tmp_path / "model"), "--check", "maybe"])


def test_a_run_s_folder_lists_what_it_started_with(finished: Path) -> None:
    told = json.loads((finished / "run" / "loaded_weights.json").read_text())
    assert told["folder"] == str(finished / "bert")
    assert [len(told[part]) for part in ("taken", "initialised", "unused", "reshaped")] == [39, 2, 7, 0]


def test_weights_that_are_not_the_runs_are_no_best(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "bert" / "model.safetensors", folder / "run" / "export")
    with pytest.raises(
        UserError, match=r"^run: .*model\.safetensors is not what was written there; take --weights last"
    ):
        export([str(folder / "run"), "--output", str(tmp_path / "model")])


def test_an_export_replaces_nothing_but_an_export(finished: Path, folder: Path, tmp_path: Path) -> None:
    """Not the user's own model, nor an export that a file was added to."""
    before = content(folder / "bert")
    for target in ("bert", "run", "run/export"):
        if target == "run/export":
            (folder / target / "README.md").write_text("mine")
        with pytest.raises(UserError, match="it exists and is not an exported model alone"):
            export([str(finished / "run"), "--output", str(folder / target)])
    assert content(folder / "bert") == before
    assert export([str(finished / "run"), "--output", str(tmp_path / "model")]) == 0
    assert export([str(finished / "run"), "--weights=last", "--output", str(tmp_path / "model")]) == 0


@pytest.mark.parametrize("output", [".", ""])
def test_an_export_needs_a_folder_of_its_own(finished: Path, output: str) -> None:
    with pytest.raises(UserError, match=r"^output: '\.' is not allowed"):
        export([str(finished / "run"), "--output", output])


def test_a_model_is_no_run(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is an exported model already"):
        export([str(finished / "bert"), "--output", str(tmp_path / "model")])


def state_of(folder: Path) -> RunState:
    return read_state(start_of(folder))


def test_the_best_weights_stay_with_the_run_that_goes_on(folder: Path, tmp_path: Path) -> None:
    """In its own folder, and in another one that goes on from its checkpoint."""
    best = of_state(state_of(folder))
    assert best is not None
    assert regain(state_of(folder), start_of(folder), folder / "run") == best
    (tmp_path / "other").mkdir()
    assert regain(state_of(folder), start_of(folder), tmp_path / "other") == best
    assert content(tmp_path / "other" / "export") == content(folder / "run" / "export")


@pytest.mark.parametrize("fault", ["later", "gone", "damaged"])
def test_a_best_whose_weights_are_lost_is_chosen_anew(
    folder: Path, fault: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Such as those of an evaluation after the checkpoint, which the run may never come to again."""
    exported = folder / "run" / "export"
    if fault == "later":
        origin = json.loads((exported / "zerobert.json").read_text())
        origin["best"]["step"] = 99
        (exported / "zerobert.json").write_text(json.dumps(origin))
    elif fault == "gone":
        shutil.rmtree(exported)
    else:
        (exported / "model.safetensors").write_bytes(b"other")
    assert regain(state_of(folder), start_of(folder), folder / "run") is None
    assert "the best is chosen anew from here on" in capsys.readouterr().out
    assert not exported.exists()
    assert (folder / "run" / "earlier-1" / "export").exists() == (fault != "gone")


def test_a_best_that_the_checkpoint_does_not_know_is_set_aside(folder: Path) -> None:
    state = replace(state_of(folder), best=None, best_step=None)
    assert regain(state, start_of(folder), folder / "run") is None
    assert (folder / "run" / "earlier-1" / "export").is_dir()


@pytest.mark.slow
def test_a_resume_from_an_earlier_step_reports_its_own_best(folder: Path, tmp_path: Path) -> None:
    """The later best belongs to a course that this run left."""
    first = run(tmp_path / "run", *options(folder), "--train.save_interval=4", "--train.keep=9")
    start = tmp_path / "run" / "checkpoints" / "step-000004"
    late = [*options(folder, 12), "--train.save_interval=4", "--train.keep=9", "--optim.learning_rate=1e-9"]
    late.remove("--optim.learning_rate=0.003")
    printed = run(tmp_path / "run", *late, f"--resume={start}")
    origin = json.loads((tmp_path / "run" / "export" / "zerobert.json").read_text())
    assert origin["best"]["step"] in (4, 8, 12)
    assert f"evaluation at step {origin['best']['step']}: " in first + printed
    accuracy = json.loads((tmp_path / "run" / "report" / "report.json").read_text())["accuracy"]
    assert accuracy == pytest.approx(origin["best"]["value"], abs=0.2)


def test_best_weights_of_what_has_none_are_refused(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^weights: .* has no best weights; take --weights last"):
        export([str(start_of(finished)), "--weights=best", "--output", str(tmp_path / "model")])


def test_a_second_start_of_a_finished_run_changes_nothing(folder: Path) -> None:
    """Also where its files lie elsewhere now: their content is the same."""
    before = content(folder / "run")
    printed = run(folder / "run", *options(folder), "--resume=auto")
    assert f"{folder / 'run'} is finished; its model is in export/ and nothing was changed" in printed
    assert "; without effect: model.init_from " in printed
    after = content(folder / "run")
    assert {name: of for name, of in before.items() if not name.startswith("beats/")} == after


def test_a_finished_run_is_over_and_a_longer_one_is_not(folder: Path) -> None:
    config = configuration(folder)
    task = SequenceClassification(config)
    facts = recorded_facts(task, config, start_of(folder))
    assert is_over(task, config, start_of(folder), facts)
    longer = replace(config, train=replace(config.train, steps=20))
    assert not is_over(task, longer, start_of(folder), facts)
    (folder / "run" / "report" / "report.txt").unlink()
    assert not is_over(task, config, start_of(folder), facts)
    (folder / "run" / "report" / "report.txt").touch()
    assert is_over(task, config, start_of(folder), facts)
    shutil.rmtree(folder / "run" / "export")
    assert not is_over(task, config, start_of(folder), facts)


def test_renamed_classes_are_refused_on_every_rank(folder: Path) -> None:
    for name in ("train.csv", "test.csv"):
        path = folder / name
        path.write_text(path.read_text().replace("negative", "unhappy"))
    before = content(folder / "run" / "checkpoints")
    printed = run(folder / "run", *options(folder, 24), "--resume=auto", "--data.workers=1", ranks=2, code=2)
    errors = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "labelled.train: the classes of this run (neutral, positive, unhappy) are not those of" in errors[0]
    assert "(negative, neutral, positive)" in errors[0]
    assert before == content(folder / "run" / "checkpoints")


def test_a_new_class_is_refused(folder: Path) -> None:
    with (folder / "train.csv").open("a") as file:
        file.write("a cat,mixed\n")
    refuse(folder, r"^labelled\.train: the classes of this run \(mixed, negative, .*put back")


def test_other_training_examples_are_refused(folder: Path) -> None:
    with (folder / "train.csv").open("a") as file:
        file.write("a good cat,neutral\n")
    refuse(folder, r"^labelled\.train: the training examples of this run \(sha256 \w{12}\) are not those of")


def test_other_validation_examples_are_refused(folder: Path) -> None:
    """The best score was measured on others."""
    config = configuration(folder)
    write_examples(folder / "validation.csv", 12)
    task = SequenceClassification(config)
    held_out = task.sources["validation"]
    assert len(held_out.labels) > 0
    facts = {fact.name: fact.value for fact in task.facts()}
    other = replace(config, labelled=replace(config.labelled, validation=str(folder / "validation.csv")))
    changed = {fact.name: fact.value for fact in SequenceClassification(other).facts()}
    assert facts["validation examples"] != changed["validation examples"]
    refuse(folder, r"^labelled\.train: the training examples", other)  # nothing is held out of them any more


def test_another_tokenizer_of_the_same_size_is_refused(folder: Path) -> None:
    shutil.rmtree(folder / "bert")
    write_model(folder / "bert", WORDS[::-1])
    refuse(folder, r"^model\.init_from: the tokenizer's rules and pieces of this run")


def test_other_base_weights_are_refused(folder: Path) -> None:
    weights = folder / "bert" / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    refuse(folder, r"^model\.init_from: the base weights of this run")


def test_other_test_examples_are_no_contradiction(folder: Path) -> None:
    write_examples(folder / "test.csv", 12)
    config = configuration(folder)
    task = SequenceClassification(config)
    facts = recorded_facts(task, config, start_of(folder))
    assert not is_over(task, config, start_of(folder), facts)


def test_a_run_does_not_end_before_its_checkpoint(folder: Path) -> None:
    refuse(folder, r"^train\.steps: the run would end at step 8 and .* is at step 16", configuration(folder, 8))


def test_a_store_prepared_anew_is_refused(tmp_path: Path) -> None:
    """The same texts under another vocabulary of the same size."""
    corpus, data = write_corpus(tmp_path / "corpus.jsonl", TEXTS), tmp_path / "data"
    prepared = PrepareConfig(source=[str(corpus)], output=str(data), vocab_size=400, workers=0)
    prepare(prepared)
    config = RunConfig(output=str(tmp_path / "run"), train=TrainConfig(steps=3))
    config.data = replace(config.data, path=str(data), sequence_length=32)
    saved = {fact.name: fact.value for fact in Pretraining(config).facts()}
    options = ["--train.steps=2", "--train.global_batch=4", "--data.sequence_length=32", "--train.eval_samples=4"]
    run(tmp_path / "run", f"--data.path={data}", *options)
    shutil.rmtree(data)
    prepare(replace(prepared, lowercase=False))
    printed = run(tmp_path / "run", f"--data.path={data}", *options, "--train.steps=3", "--resume=auto", code=2)
    assert "error: data.path: the tokenizer's rules and pieces of this run" in printed
    changed = {fact.name: fact.value for fact in Pretraining(config).facts()}
    assert all(saved[name] != changed[name] for name in ("tokenizer's rules and pieces", "prepared texts"))
