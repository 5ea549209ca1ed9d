"""Prepare, train, evaluate, compare, predict and load from Python, on one rank and without a launcher: for a notebook.

Options have the names of the command line, dots included: `{"train.steps": 100}`. Training on several ranks needs a
launcher: `deepspeed launch/train.py`.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from engine.errors import RunError, UserError
from launch.configure.options import parse

if TYPE_CHECKING:
    from engine.data.store.manifest import Manifest

Options = Mapping[str, object]


def prepare(output: str | Path, **options: Any) -> Manifest:
    """Turn raw text into a token store, as `zerobert prepare` does.

    Args:
        output: folder of the store.
        options: fields of `PrepareConfig`; without `source` the documentation that comes with Python is read, and
            without `workers` this process does all the work.

    Raises:
        UserError: what is wrong with the options or the text.
    """
    from engine.data.store.prepare import PrepareConfig
    from engine.data.store.prepare import prepare as run

    known = PrepareConfig.__dataclass_fields__
    for name in options:
        if name not in known:
            raise UserError(f"{name}: no such field; choose one of {', '.join(known)}")
    return run(PrepareConfig(output=str(output), **{"source": ["embedded"], "workers": 0, **options}))


def train(options: Options, recipe: str | Path | None = None) -> Path:
    """Pre-train or fine-tune on one rank, as `zerobert train` does; what that prints is printed here.

    The rank is a process of its own: DeepSpeed keeps process groups that a second run in the same process would meet.

    Args:
        options: values by dotted name, which win over the recipe's.
        recipe: a YAML file.

    Returns:
        The folder of the run; `export` in it is the model.

    Raises:
        UserError, RunError: as the command.
    """
    given = arguments(options, recipe)
    output = Path(parse(given).output)
    command = [sys.executable, str(Path(__file__).parent / "train.py"), *given]
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        assert process.stdout is not None
        try:
            for line in process.stdout:
                print(line, end="", flush=True)
        except KeyboardInterrupt:
            process.send_signal(signal.SIGINT)  # it saves
            process.wait()
            raise
        code = process.wait()
        errors.seek(0)
        told = errors.read().strip()
    if code:
        last = told.splitlines()[-1].removeprefix("error: ") if told else f"train: ended with code {code}"
        raise UserError(last) if code == 2 else RunError(last)
    return output


def seeds(
    options: Options,
    recipe: str | Path | None = None,
    *,
    count: int | None = None,
    folds: int | None = None,
    runs: int = 1,
    launcher: str = "",
) -> dict[str, Any]:
    """The same training with several seeds, or on folds of its data, as `zerobert seeds`; runs that are over are kept.

    Args:
        options, recipe: as of `train`.
        count: of seeds; None: 5, or 1 with folds.
        folds: of labelled.train.
        runs: at once.
        launcher: what starts a run, such as "deepspeed --num_accelerators 2"; by default python, one rank.

    Returns:
        The report on all runs, what is in report/report.json of the output folder.

    Raises:
        UserError, RunError: as the command.
    """
    from launch.seeds.command import main

    own = {"seeds": count, "folds": folds, "runs": runs, "launcher": launcher or None}
    given = arguments(options, recipe)
    code = main([*(f"--{name}={value}" for name, value in own.items() if value is not None), "--", *given])
    output = Path(parse(given).output)
    if code == 2:
        raise UserError("options: a run refused them, in the line that it printed; correct them")
    if code or not (output / "report" / "report.json").is_file():
        raise RunError(f"seeds: stopped; the same call goes on in {output}")
    report: dict[str, Any] = json.loads((output / "report" / "report.json").read_text(encoding="utf-8"))
    return report


def compare(first: str | Path, second: str | Path, metric: str | None = None) -> dict[str, Any]:
    """Whether the difference of two finished runs, or of two folders of `seeds`, is real, as `zerobert compare --json`.

    Args:
        metric: the score to compare; None takes all that both tell of single examples.

    Raises:
        UserError: they can't be compared, or have no such score.
    """
    from launch.compare.command import compare as run

    return run(Path(first), Path(second), metric)


def evaluate(run: str | Path, split: str = "validation", options: Options | None = None) -> dict[str, float]:
    """Scores of a run's exported model by name, read back from its folder.

    Args:
        run: the folder of a run that is over.
        split: validation or test.
        options: what is to differ from the run's own configuration, such as `labelled.test`.

    Raises:
        UserError: the run holds no model, or the task no such split.
    """
    from engine.dist import World
    from engine.evaluate import evaluate_export
    from engine.train.start import with_hub_model
    from launch.train import build_task

    folder = Path(run)
    for part in ("config.yaml", "export"):
        if not (folder / part).exists():
            raise UserError(f"run: {str(folder)!r} holds no {part}; give the folder of a run that is over")
    config = with_hub_model(parse(arguments(options or {}, folder / "config.yaml")), None, World())
    micro_batch = config.train.micro_batch if isinstance(config.train.micro_batch, int) else 32
    evaluation = evaluate_export(build_task(config), folder / "export", split, micro_batch, World())
    if evaluation is None:
        raise UserError(f"split: {split!r} has no examples in this run; choose validation, or test with labelled.test")
    return evaluation.scalars


def predict(model: str | Path, rows: Iterable[Mapping[str, Any] | str], **options: Any) -> list[dict[str, Any]]:
    """Rows with a model's predictions, as `zerobert predict` writes them; it holds all of them in memory.

    Args:
        model: a run's folder, an exported one, or any Hugging Face folder of our architectures with a task's head.
        rows: texts, or rows whose columns the options `text` and `text_pair` name.
        options: fields of `PredictConfig`.

    Raises:
        UserError: what is wrong with the model, the options or a row.
    """
    from engine.predict.options import PredictConfig
    from engine.predict.stream import predict_rows

    known = [name for name in PredictConfig.__dataclass_fields__ if name not in ("model", "input", "output", "format")]
    for name in options:
        if name not in known:
            raise UserError(f"{name}: no such field; choose one of {', '.join(known)}")
    return list(predict_rows(PredictConfig(str(model), "rows", "rows", **options), rows))


def load(folder: str | Path) -> tuple[Any, Any]:
    """The model, in evaluation mode, and the tokenizer of a run or of an exported folder, as transformers has them.

    Raises:
        UserError: there is no model.
    """
    import transformers

    path = Path(folder)
    path = path / "export" if (path / "export").is_dir() else path
    if not (path / "config.json").is_file():
        raise UserError(f"folder: {str(folder)!r} holds no model; give a run's folder or an exported one")
    config = transformers.AutoConfig.from_pretrained(path)
    model = getattr(transformers, config.architectures[0]).from_pretrained(path)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(path)


def arguments(options: Options, recipe: str | Path | None) -> list[str]:
    """The command line of options."""
    first = [] if recipe is None else ["--config", str(recipe)]
    return first + [f"--{name}={in_yaml(value)}" for name, value in options.items()]


def in_yaml(value: object) -> str:
    """A value as the command line takes it."""
    if isinstance(value, (str, Path)):
        return str(value)
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()
