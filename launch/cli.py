"""The one command, `globallocal`, composed from thin sub-commands in the order of the work.

Each module of sub-commands offers `register(app)` and imports torch, DeepSpeed and MLflow only inside the
function that needs them, so that `--help` answers at once.
"""

import os
import re
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from data_prep.errors import UserError
from launch.about import version
from launch.commands import checkpoints as checkpoint_commands
from launch.commands import config as config_commands
from launch.commands import data as data_commands
from launch.commands import evaluate as evaluate_commands
from launch.commands import generate as generate_commands
from launch.commands import look as look_commands
from launch.commands import model as model_commands
from launch.commands import run as run_commands
from launch.commands import serve as serve_commands
from launch.interrupt import INTERRUPTED, bounded_interrupt, next_time

UsageError: Any = typer.BadParameter.__mro__[1]  # typer carries a copy of click, and gives this class no public name

app = typer.Typer(
    name="globallocal",
    help="Raw text in, a trained GlobalLocal language model out: tokenizer → prepare → train → export → generate.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


def show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"globallocal {version()}")
        raise typer.Exit()


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


for commands in (
    *(data_commands, run_commands, config_commands, look_commands, checkpoint_commands),
    *(evaluate_commands, model_commands, generate_commands, serve_commands),
):
    commands.register(app)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one sub-command and return its exit code: the one door for mistakes and Ctrl-C.

    0: done. 2: something to fix, one `error:` line each on stderr. 130: interrupted, with a line that says what the
    same command does next. Else the job's own code.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        with bounded_interrupt(words):
            code = app(words, standalone_mode=False)
    except UserError as error:
        return _refuse(error.problems, error.exit_code, error.word)
    except UsageError as error:
        if not words or words in (["checkpoints"], ["config"]):
            error.show()  # the help
            return int(error.exit_code)
        where = error.ctx.command_path.replace("python -m launch", "globallocal") if error.ctx else "globallocal"
        said = " ".join(error.format_message().split())[:500]
        return _refuse([f"{said}; {_meant(said, words) or f'{where} --help lists what is valid'}"])
    except BrokenPipeError:  # the reader has seen enough: `globallocal … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if not error.filename:
            raise
        problem = f"{error.filename}: {error.strerror}; give a path that is there and that you may use"
        return _refuse(UserError(problem).problems)
    if code == INTERRUPTED:
        print(next_time(words), file=sys.stderr, flush=True)
    return code if isinstance(code, int) else 0


def _meant(said: str, words: Sequence[str]) -> str | None:
    """What a person who typed a setting as an option, or a run file without `--config`, wanted to type."""
    setting = next((word for word in words if re.fullmatch(r"--[a-z]+\.\w+(=.*)?", word)), None)
    if setting and setting.partition("=")[0] in said:
        return f"a setting has no dashes: {setting.removeprefix('--').partition('=')[0]}=VALUE"
    if "'--config'" in said and len(words) > 1 and not words[1].startswith("-") and "=" not in words[1]:
        return f"did you mean globallocal {words[0]} --config {words[1]}?"
    return None


def _refuse(problems: Sequence[str], exit_code: int = 2, word: str = "error") -> int:
    for problem in problems:
        print(f"{word}: {problem}", file=sys.stderr)
    return exit_code
