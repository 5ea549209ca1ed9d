"""A copy of the code and of the resolved configuration for a job, so that what was submitted is what runs later."""

from __future__ import annotations

import shutil
from pathlib import Path

import yaml

from engine.config import RunConfig
from engine.errors import RunError, UserError

#: root of the checkout, or the folder that the packages are installed in
ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("engine", "launch", "slurm")
LEFT_OUT = shutil.ignore_patterns(".*", "__pycache__", "*.pyc")


def next_folder(output: Path) -> Path:
    """The folder of a run's next submission, which doesn't exist yet: <output>/submit/001, 002, ..."""
    taken = [int(path.name) for path in (output / "submit").glob("*") if path.name.isdecimal()]
    return output / "submit" / f"{max(taken, default=0) + 1:03d}"


def submission_folder(output: Path) -> Path:
    """Make the folder of a run's next submission; concurrent submissions get different folders.

    Raises:
        UserError: the output folder can't be written.
    """
    while True:
        folder = next_folder(output)
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            if not (output / "submit").is_dir():
                raise UserError(f"output: {str(output)!r} is not a folder; give another") from None
            continue
        except OSError as error:
            raise UserError(f"output: {str(output)!r} can't be written ({error.strerror}); give another") from error
        return folder


def copy_code(target: Path) -> None:
    """Copy the packages that a job runs, without repositories and caches.

    Raises:
        RunError: the disk is full or can't be written.
    """
    try:
        for name in PACKAGES:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, target / name, ignore=LEFT_OUT)
    except OSError as error:
        raise RunError(f"the code can't be copied to {target}: {error}") from error


class QuotedDumper(yaml.SafeDumper):
    """Quotes every string that isn't a plain word, so that no YAML reader takes it for a number or a boolean."""

    def represent_text(self, text: str) -> yaml.ScalarNode:
        plain = text.isascii() and text.isalpha() and text.lower() not in ("true", "false", "null", "nan", "inf")
        style = None if plain else '"'
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)


QuotedDumper.add_representer(str, QuotedDumper.represent_text)


def configuration_text(config: RunConfig) -> str:
    """The whole configuration as a recipe in YAML."""
    values = config.to_dict()
    values["optim"]["betas"] = list(values["optim"]["betas"])
    return yaml.dump(values, Dumper=QuotedDumper, sort_keys=False, allow_unicode=True, width=10**6)


def write_configuration(config: RunConfig, path: Path) -> None:
    """Write the recipe of a job, and check it by reading it back.

    Raises:
        RunError: it reads back differently.
    """
    from launch.configure.options import parse

    path.write_text(configuration_text(config), encoding="utf-8")
    if parse(["--config", str(path)]) != config:
        raise RunError(f"the configuration reads back differently from {path}; submit slurm/train.sbatch by hand")


def discard(folder: Path, output: Path) -> None:
    """Remove the folder of a failed submission, and the folders above it that it made, if they are empty."""
    shutil.rmtree(folder, ignore_errors=True)
    for above in (folder.parent, output / "logs", output):
        try:
            above.rmdir()
        except OSError:
            continue
