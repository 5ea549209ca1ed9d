"""`zerobert COMMAND`: a module of this package for each of COMMANDS."""

from __future__ import annotations

import importlib
import sys

from launch.cli import run_command, unknown_command

#: name -> module of this package with its `main`, and what it does
COMMANDS = {
    "doctor": ("doctor.command", "what this machine has, what is missing, and the remedy"),
    "prepare": ("prepare", "raw text -> vocabulary and memory-mapped shards"),
    "plan": ("forecast.command", "which ZeRO stage and micro-batch fit, what a step costs, and why"),
    "augment": ("augment.command", "new labelled examples of those that there are"),
    "train": ("train", "pre-train or fine-tune (the same as launch/train.py)"),
    "seeds": ("seeds.command", "train with several seeds, or on folds of the data: mean, spread and interval"),
    "suite": ("suite.command", "tasks x settings x seeds from one YAML file: one table with intervals"),
    "ablate": ("ablate.command", "whether switches help: effects paired by seed, with interval and correction"),
    "scaling": ("scaling.command", "how loss and abilities grow with scale: ladders, laws with intervals, emergence"),
    "search": ("search.command", "find the best options of a training by trials (Optuna)"),
    "compare": ("compare.command", "whether the difference of two finished runs is real"),
    "submit": ("slurm.submit", "train as a SLURM job that saves, requeues and resumes by itself"),
    "status": ("slurm.status", "where a SLURM job or a run stands"),
    "cancel": ("slurm.cancel", "end a SLURM job, at once or after a checkpoint"),
    "export": ("export", "checkpoint -> Hugging Face folder, or an ONNX graph of any model with a task's head"),
    "average": ("average", "the mean of the weights of several models -> Hugging Face folder"),
    "prune": ("prune.command", "a smaller model: without the heads, neurons and layers that matter least"),
    "trim-vocabulary": ("prune.vocabulary", "a smaller model: without the tokens that your texts don't have"),
    "compress": ("compress.command", "the smallest and fastest graph of a model that keeps a target"),
    "quantise": ("quantise.command", "a model as an int8 ONNX folder, within a budget of accuracy"),
    "predict": ("predict", "predictions of a model for every row of a file or a pipe"),
    "serve": ("serve.command", "predictions of a model over HTTP"),
    "curves": ("curves", "print or plot a run's curves from its TensorBoard files"),
    "certify": (
        "certify.command",
        "kill -9 runs at random moments; prove that resumes lose and repeat nothing",
    ),
    "build-kernels": ("build_kernels", "compile the CUDA kernels ahead of time"),
    "demo": ("demo.command", "the whole way on text that ships with Python"),
}


def usage() -> str:
    """The text of `zerobert --help`."""
    lines = [f"  {name:15} {what}" for name, (_, what) in COMMANDS.items()]
    last = (
        "zerobert COMMAND --help, or zerobert help COMMAND, tells the options; zerobert --version the version;\n"
        "zerobert --print_completion SHELL prints what bash, zsh, fish, tcsh or powershell complete them with."
    )
    return "usage: zerobert COMMAND [options]\n\n" + "\n".join(lines) + f"\n\n{last}"


def dispatch(arguments: list[str]) -> int:
    """Run the named command."""
    if arguments and arguments[0].startswith("--local_rank="):  # deepspeed puts it first
        arguments = arguments[1:]
    first, *others = arguments or ["help"]
    if first in ("-h", "--help", "help"):
        if not others:
            print(usage())
            return 0
        first, others = others[0], ["--help"]
    if first in ("-V", "--version", "version"):
        import engine

        print(f"zerobert {engine.__version__}")
        return 0
    if first == "--print_completion":
        from launch.completion import completion_script

        print(completion_script(COMMANDS, others[0] if others else ""))
        return 0
    if first not in COMMANDS:
        raise unknown_command("command", first, COMMANDS)
    return int(importlib.import_module(f"launch.{COMMANDS[first][0]}").main(others))


def main() -> None:
    """Entry point of the console command."""
    run_command(dispatch, sys.argv[1:])


if __name__ == "__main__":
    main()
