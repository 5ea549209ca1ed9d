"""A task that a module from outside of the package registers is one like ours, from the command line to the export."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForTokenClassification

from engine.config import TASKS, ModelConfig, RunConfig, Shape, extra_sections
from engine.data.loading.source import Cursor, MicroBatch
from engine.errors import UserError
from engine.export import export_checkpoint
from engine.model.flops import training_flops
from engine.train.checkpoint.folder import check_resumable, newest_intact, read_state
from launch.configure.options import build_parser, parse
from launch.forecast.command import main as plan
from tests.conftest import ROOT
from tests.tasks.parity import ENTRY, Parity, ParityConfig, ParitySource
from tests.train.runs import NO_DROPOUT, environment, losses
from tests.train.runs import SMALL as PRETRAINING
from tests.warm import SERVER

#: the task has a length of its own
SMALL = [option for option in PRETRAINING if not option.startswith("--data.sequence_length=")]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{number}" for number in range(20))]


@pytest.fixture
def _registered() -> Iterator[None]:
    TASKS.register("parity", ENTRY)
    yield
    TASKS.remove("parity")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run of the task, by a script of the user's, and what it printed."""
    folder = tmp_path_factory.mktemp("parity")
    (folder / "vocab.txt").write_text("".join(f"{word}\n" for word in WORDS))
    (folder / "recipe.yaml").write_text(f"task: parity\nparity: {{vocabulary: {folder / 'vocab.txt'}, length: 6}}\n")
    options = [*SMALL, *NO_DROPOUT, f"--config={folder / 'recipe.yaml'}", "--parity.length=10", "--train.steps=30"]
    command = [str(ROOT / "tests" / "tasks" / "parity.py"), f"--output={folder / 'run'}", *options]
    done = SERVER.run([*command, "--optim.learning_rate=1e-2"], [environment()], ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "run", done.stdout


def test_its_data_and_its_scores_are_told_and_drawn(trained: tuple[Path, str]) -> None:
    run, printed = trained
    assert "sequences of 10 tokens" in printed
    assert printed.count("accuracy 1.000000") == 1
    curve = losses(run, "train/loss")
    assert curve[0][1] == pytest.approx(0.693, abs=0.1)
    assert curve[-1][1] < 0.1


def test_its_export_has_the_class_that_it_names_and_transformers_scores_it_the_same(
    trained: tuple[Path, str],
) -> None:
    run, _ = trained
    assert json.loads((run / "export" / "config.json").read_text())["architectures"] == ["BertForTokenClassification"]
    model, info = AutoModelForTokenClassification.from_pretrained(run / "export", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    batch = ParitySource(10, len(WORDS), seed=2).collate(torch.arange(64).numpy())
    with torch.no_grad():
        logits = model.eval()(batch["input_ids"].view(64, 10)).logits
    assert model.config.id2label == {0: "even", 1: "odd"}
    assert torch.equal(logits.argmax(-1).flatten(), batch["labels"])


def test_a_checkpoint_of_it_is_exported_where_nobody_knows_the_task(trained: tuple[Path, str], tmp_path: Path) -> None:
    newest = newest_intact(trained[0] / "checkpoints")
    assert newest is not None
    export_checkpoint(newest, tmp_path / "model")
    values = json.loads((tmp_path / "model" / "config.json").read_text())
    assert values["architectures"] == ["BertForTokenClassification"]


def test_a_checkpoint_that_does_not_tell_its_class_is_exported_as_its_task_says(
    trained: tuple[Path, str], tmp_path: Path
) -> None:
    """As those of earlier versions; a task that nobody knows any more is refused, and nothing is guessed."""
    newest = newest_intact(trained[0] / "checkpoints")
    assert newest is not None
    older = Path(shutil.copytree(newest, tmp_path / newest.name))
    values = json.loads((older / "config.json").read_text())
    del values["architectures"]
    (older / "config.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"^task: 'parity' is not allowed; choose one of pretrain, "):
        export_checkpoint(older, tmp_path / "model")
    TASKS.register("parity", ENTRY)
    try:
        export_checkpoint(older, tmp_path / "model")
    finally:
        TASKS.remove("parity")
    exported = json.loads((tmp_path / "model" / "config.json").read_text())
    assert exported["architectures"] == ["BertForTokenClassification"]


def test_a_task_whose_head_has_no_class_is_refused_before_it_is_trained(
    trained: tuple[Path, str], tmp_path: Path
) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "from launch.train import main, run_command; from tests.tasks.parity import ENTRY, TASKS, Parity;"
        "Parity.export_class = lambda self, config: 'BertForParity'; TASKS.register('parity', ENTRY); run_command(main)"
    )
    recipe = trained[0].parent / "recipe.yaml"
    command = [str(program), f"--output={tmp_path / 'run'}", *SMALL, f"--config={recipe}"]
    done = SERVER.run(command, [environment()], ROOT)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert errors == [
        "error: export: no class of transformers is known for the weights ('BertForParity'); the task must name one, "
        "such as BertForTokenClassification, as its export_class"
    ]
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.usefixtures("_registered")
def test_its_section_is_saved_and_read_and_what_it_fixes_stays(trained: tuple[Path, str]) -> None:
    run, _ = trained
    config = parse(["--config", str(run / "config.yaml")])
    assert config.extra["parity"] == ParityConfig(str(run.parent / "vocab.txt"), length=10)
    newest = newest_intact(run / "checkpoints")
    assert newest is not None
    state = read_state(newest)
    check_resumable(state, newest, config.to_dict())
    other = replace(config, extra={"parity": ParityConfig(length=12)}).to_dict()
    with pytest.raises(UserError, match=r"^parity\.length: 12 differs from 10 in "):
        check_resumable(state, newest, other)


@pytest.mark.usefixtures("_registered")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--task=parties"], "task: 'parties' is not allowed; give one of pretrain, sequence_classification, "),
        (["--task=parity", "--parity.length=3"], "parity.length: 3 is not allowed; give at least 4"),
        (["--task=parity", "--parity.length=long"], "parity.length: 'long' is not allowed; give a whole number"),
        (["--task=parity", "--parity.lenght=8"], "parity.lenght: no such field; did you mean parity.length?"),
        (["--task=parity", "--parity={}"], "parity: it is a section; give its fields one by one"),
        (["--task=parity", "--data.path=x"], "data.path: 'x' has no effect while task is parity; give --task pretrain"),
        (["--parity.vocabulary=x"], "parity.vocabulary: 'x' has no effect while task is pretrain; give --task parity"),
    ],
)
def test_a_mistake_in_its_options_is_one_line(options: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(options)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("_registered")
def test_a_recipe_with_a_bad_value_of_its_section_is_refused(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("task: parity\nparity:\n  length: null\n")
    with pytest.raises(UserError, match=r"^parity\.length: null is not allowed; .* \(line 3 of "):
        parse([f"--config={tmp_path / 'recipe.yaml'}"])


@pytest.mark.usefixtures("_registered")
def test_the_help_shows_the_task_and_its_section() -> None:
    text = build_parser().format_help()
    assert f"{{{','.join(TASKS.names)}}}" in text
    assert TASKS.names[:2] == ("pretrain", "sequence_classification")
    assert TASKS.names[-1] == "parity"
    assert "parity (odd or even)" in " ".join(text.split())
    assert "--parity.length" in text


@pytest.mark.usefixtures("_registered")
def test_it_is_planned_by_what_its_entry_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("task: parity\nparity: {length: 12}\nmodel: {size: tiny}\ntrain: {global_batch: 64}\n")
    options = [f"--config={recipe}", "--gpu=a100", "--gpus=1", "--vocabulary=1000", "--activation-checkpointing=off"]
    assert plan([*options, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["request"]["sequence_length"], found["request"]["read_share"]) == (12, 1.0)
    shape = Shape(*ModelConfig("tiny").dimensions(), 1000, decoder=False)
    assert found["choice"]["cost"]["flops"] == 64 * training_flops(shape, [12], 12)
    assert plan([*options, "--sequence-length=16"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "--parity.length 16" in printed
    assert "--parity.vocabulary FILE" in printed
    for name in ("--data.", "--labelled.", "--model.init_from"):
        assert name not in printed


@pytest.mark.usefixtures("_registered")
def test_its_flops_are_of_all_tokens(trained: tuple[Path, str]) -> None:
    task = Parity(parse(["--config", str(trained[0] / "config.yaml")]))
    batch = MicroBatch(task.train_source().collate(torch.arange(3).numpy()), {}, Cursor())
    shape = Shape(32, 2, 2, 128, task.model_config.vocab_size, decoder=False)
    assert task.flops(batch) == training_flops(shape, [10] * 3, 30)
    assert task.flops(batch) > training_flops(shape, [10] * 3, 0)


def test_without_it_nothing_of_it_is_there() -> None:
    assert "parity" not in RunConfig().to_dict()
    with pytest.raises(UserError, match=r"^task: 'parity' is not allowed; choose one of pretrain, sequence_class"):
        RunConfig(task="parity").validate()
    with pytest.raises(UserError, match=r"^parity\.length: no such field"):
        parse(["--parity.length=8"])


@pytest.mark.parametrize("section", ["train", "data", "seed"])
def test_a_section_must_not_have_the_name_of_another_part(section: str) -> None:
    TASKS.register("other", replace(ENTRY, section=section))
    try:
        with pytest.raises(ValueError, match=f"the section '{section}' of a task is another part"):
            extra_sections()
    finally:
        TASKS.remove("other")
