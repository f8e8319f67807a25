"""The one command, `globallocal`, composed from thin sub-commands in the order of the work.

Each module of sub-commands offers `register(app)` and imports torch, DeepSpeed and MLflow only inside the
function that needs them, so that `--help` answers at once.
"""

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from data_prep.errors import UserError
from launch.about import version
from launch.commands import checkpoints as checkpoint_commands
from launch.commands import data as data_commands
from launch.commands import model as model_commands
from launch.commands import run as run_commands

app = typer.Typer(
    name="globallocal",
    help="Raw text in, a trained GlobalLocal language model out: tokenizer → prepare → train → evaluate → export.",
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


for commands in (data_commands, run_commands, checkpoint_commands, model_commands):
    commands.register(app)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one sub-command and return its exit code.

    0: done. 2: something to fix, one `error:` line each on stderr. 130: interrupted. Else the job's own code.
    """
    try:
        app(list(sys.argv[1:] if arguments is None else arguments))
    except UserError as error:
        for problem in error.problems:
            print(f"{error.word}: {problem}", file=sys.stderr)
        return error.exit_code
    except SystemExit as leaving:
        return leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    return 0
