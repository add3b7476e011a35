"""`python -m kda_ops <command>`."""

import argparse
import sys
from collections.abc import Sequence

from kda_ops.demos import compiled_layer, disaggregated, doctor, training
from kda_ops.explain import command as explain

COMMANDS = {
    "demo": compiled_layer,
    "train": training,
    "explain": explain,
    "doctor": doctor,
    "pd-demo": disaggregated,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. Each is a module with `SUMMARY`, `add_arguments(parser)`, `run(args)`."""
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
    args = parser.parse_args(argv)
    return COMMANDS[args.command].run(args)


class _Formatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps the paragraphs of a module's docstring and shows informative defaults."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, False):
            return action.help
        return super()._get_help_string(action)


if __name__ == "__main__":
    sys.exit(main())
