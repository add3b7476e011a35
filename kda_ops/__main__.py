"""`python -m kda_ops <command>`."""

import argparse
import contextlib
import json
import sys
from collections.abc import Sequence
from typing import Any

from kda_ops.demos import arguments, bench, compiled_layer, disaggregated, doctor, training
from kda_ops.explain import command as explain

COMMANDS = {
    "demo": compiled_layer,
    "bench": bench,
    "train": training,
    "explain": explain,
    "doctor": doctor,
    "pd-demo": disaggregated,
}
STDOUT = "-"
FAULTS_OF_USERS = (ValueError, ImportError, OSError)  # exit status 2


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. Each is a module with `SUMMARY`, `add_arguments(parser)` and `run(args,
    results)`, which prints, fills `results` with what `--json` writes, and returns the exit status.
    """
    parser = argparse.ArgumentParser(
        prog="python -m kda_ops",
        description="Kimi Delta Attention as operators that torch.compile understands.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, module in COMMANDS.items():
        command = commands.add_parser(
            name, help=module.SUMMARY, description=module.__doc__, formatter_class=_Formatter
        )
        module.add_arguments(command)
        command.add_argument(
            "--json",
            nargs="?",
            const=STDOUT,
            type=_json_file,
            metavar="FILE",
            help="write the results as JSON; without a name, or as -, to standard output: the text "
            "then goes to standard error",
        )
        command.add_argument("--debug", action="store_true", help="show the tracebacks of errors")
    args = parser.parse_args(argv)
    results: dict[str, Any] = {}
    to_stdout = args.json == STDOUT
    try:
        with contextlib.redirect_stdout(sys.stderr) if to_stdout else contextlib.nullcontext():
            status = COMMANDS[args.command].run(args, results)
    except Exception as error:
        if args.debug:
            raise
        text = f"{type(error).__name__}: {error} (--debug shows where)"
        print(f"python -m kda_ops {args.command}: error: {text}", file=sys.stderr)
        return 2 if isinstance(error, FAULTS_OF_USERS) else 1
    if args.json is not None and results:  # nothing where the command was refused
        head = {"command": args.command, "exit_status": status}
        text = json.dumps(head | results, indent=2) + "\n"
        if to_stdout:
            sys.stdout.write(text)
        else:
            args.json.write_text(text, encoding="utf-8")
    return status


def _json_file(name: str) -> Any:
    return STDOUT if name == STDOUT else arguments.new_file(name)


class _Formatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps the paragraphs of a module's docstring and shows informative defaults."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, False):
            return action.help
        return super()._get_help_string(action)


if __name__ == "__main__":
    sys.exit(main())
