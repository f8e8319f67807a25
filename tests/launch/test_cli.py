"""The one command: what it lists, what it says of mistakes, what it does not import."""

import subprocess
import sys

import pytest

from launch.cli import app, main

IN_ORDER = [
    *("tokenizer", "prepare", "verify", "inspect"),
    *("estimate", "rehearse", "doctor", "train", "launch"),
    *("runs", "report"),
    *("evaluate", "export", "generate", "serve"),
]


def test_commands_are_listed_in_the_order_of_the_work() -> None:
    commands = [command.name or command.callback.__name__ for command in app.registered_commands if command.callback]
    assert commands == IN_ORDER


@pytest.mark.parametrize("command", IN_ORDER)
def test_every_help_is_a_page_with_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    said = capsys.readouterr().out
    assert f"globallocal {command}" in said
    assert "Example" in said
    assert "--help" in said


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, launch.cli; launch.cli.main(['--help']);"
        "print([name for name in ('torch', 'deepspeed', 'mlflow', 'transformers', 'datasets') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().splitlines()[-1] == "[]"


def test_module_is_the_same_command() -> None:
    done = subprocess.run([sys.executable, "-m", "launch", "train"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "--config" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "--config", "absent.yaml"], "error: absent.yaml: no such file"),
        (["estimate"], "error: give --config RUN.yaml or --preset NAME"),
        (["estimate", "--preset", "huge"], "error: --preset huge: no such preset; known: quickstart, seed"),
        (["doctor", "training.max_steps=1"], "error: training.max_steps=1: overrides need --config"),
        (["trian"], "error: No such command 'trian'. Did you mean 'train'?"),
        (["train", "quickstart", "run.seed=1"], "; did you mean globallocal train --config quickstart?"),
        (["train", "--config", "quickstart", "--run.seed=1"], "; a setting has no dashes: run.seed=VALUE"),
        (["train", "--config", "docs"], "error: docs: a folder, not a run file; the settings of a run are in its"),
        (["launch", "--config", "launch/runs/quickstart.yaml"], "error: give one of --local N, --hostfile FILE"),
    ],
)
def test_mistakes_are_plain_lines_and_exit_code_2(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    output = capsys.readouterr()
    assert said in output.err
    assert "Traceback" not in output.err + output.out
