"""The command `dpdiff`: its subcommands, and how errors become one line and an exit code."""

from __future__ import annotations

import errno
import os
import re
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated

import typer

from dpdiff._version import version_of
from dpdiff.cli.bench import bench
from dpdiff.cli.demo import demo
from dpdiff.cli.evaluate import evaluate
from dpdiff.cli.export import export
from dpdiff.cli.info import info
from dpdiff.cli.predict import predict
from dpdiff.cli.train import train

USER_ERROR = 2
FAILURE = 1
INTERRUPTED = 130
TERMINATED = 143  # by SIGTERM, which `train` is told of

# What the system refuses because of what was asked for; anything else (a full disk, a broken one) is nobody's input.
_USERS_FILES = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError)
_USERS_NAMES = (errno.ENAMETOOLONG, errno.ELOOP)
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_UsageError = typer.BadParameter.__base__  # click's; newer typers bring it along under another name

app = typer.Typer(rich_markup_mode="markdown", pretty_exceptions_enable=False, add_completion=False)
for command in (train, evaluate, predict, export, demo, info):
    app.command()(command)
app.add_typer(bench, name="bench")


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks (or set DPDIFF_DEBUG=1).")] = False,
) -> None:
    """Find what is anomalous in images, after training on normal ones.

    Example: `dpdiff demo`; each command has examples of its own, `dpdiff train --help`.

    Exit codes: 0; 2 where something that was given is wrong; 1 for a failure, such as a full disk; 130 after Ctrl-C;
    143 after SIGTERM.
    """
    if debug:
        os.environ["DPDIFF_DEBUG"] = "1"  # Lightning's processes for further devices are started with it
    if version:
        typer.echo(f"dpdiff {version_of('dpdiff', 'not installed')}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs `dpdiff` with these arguments (those of the process when None) and returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else [str(argument) for argument in arguments]
    for before, argument in zip(["dpdiff", *arguments], arguments):  # as paths they would be the current folder
        if argument == "" or re.fullmatch("--[a-z-]+=", argument):
            message = f"nothing is given after {argument or before}: expected a value"
            return _report(ValueError(message), message, USER_ERROR)
    try:
        code = app(arguments, prog_name="dpdiff", standalone_mode=False) or 0
        return _interrupted() if code == INTERRUPTED else code
    except (KeyboardInterrupt, typer.Abort) as error:
        if isinstance(error.__cause__, EOFError):  # which click takes for an answer that nobody gave
            return _report(error.__cause__, *_explain(error.__cause__))
        return _interrupted()
    except SystemExit as stopped:  # also click's answer to a closed pipe
        if stopped.code != TERMINATED:
            raise
        return _interrupted(TERMINATED)
    except _UsageError as error:
        command = error.ctx.command_path if error.ctx else "dpdiff"
        return _report(error, f"{error.format_message()} (see {command} --help)", USER_ERROR)
    except Exception as error:
        return _report(error, *_explain(error))


def _interrupted(code: int = INTERRUPTED) -> int:
    print("dpdiff: interrupted", file=sys.stderr)
    return code


def _report(error: BaseException, message: str, code: int) -> int:
    if os.environ.get("DPDIFF_DEBUG", "0") not in ("", "0"):
        traceback.print_exception(error)
    print(f"dpdiff: error: {' '.join(message.split())}", file=sys.stderr)
    return code


def _explain(error: Exception) -> tuple[str, int]:
    """A message of one line and an exit code."""
    text = str(error).strip() or type(error).__name__
    if getattr(error, "errno", None) in _NO_SPACE or "No space left on device" in text:
        return "the disk is full: free some space and run the command again", FAILURE
    if isinstance(error, OSError):
        if error.errno is None:  # raised by dpdiff itself
            return text, USER_ERROR
        message = f"{error.strerror}: {error.filename}" if error.filename else text
        users = isinstance(error, _USERS_FILES) or error.errno in _USERS_NAMES
        return message, USER_ERROR if users else FAILURE
    if isinstance(error, ValueError) and _raised_by_dpdiff(error):
        return text, USER_ERROR
    reason = next(line for line in text.splitlines() if line.strip())
    return f"{reason} ({type(error).__name__}, not your mistake: DPDIFF_DEBUG=1 shows where it happened)", FAILURE


def _raised_by_dpdiff(error: Exception) -> bool:
    """Whether the error is a check of ours, rather than one of a library that something of ours was wrong for."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return frame.f_globals.get("__name__", "").partition(".")[0] in ("dpdiff", "dpdiff_kernels")
