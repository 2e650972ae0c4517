"""`optimum-cli compress`: the commands of `hf-compress` from Optimum's command line.

Installed as `optimum/commands/register/register_hf_compress.py`, where Optimum imports it at every start: whatever is
heavy is imported when the command runs. The folders above it have no `__init__.py`, as they are parts of Optimum's
namespace (PEP 420).
"""

from __future__ import annotations

from argparse import REMAINDER, ArgumentParser

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo


class CompressCommand(BaseOptimumCLICommand):  # type: ignore[misc]
    """Hands its arguments over to the app of `hf-compress`, which knows the options, their help and their errors."""

    COMMAND = CommandInfo(
        name="compress",
        help="Compress a Transformers model with hf_compress (run, plan, eval).",
    )

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        # Without prefixes nothing is an option to argparse: --help and whatever it does not know arrive as they are.
        parser.prefix_chars = ""
        parser.add_argument("arguments", nargs=REMAINDER)

    def run(self) -> None:
        from hf_compress.cli import app

        app(args=self.args.arguments, prog_name="optimum-cli compress")


REGISTER_COMMANDS = [CompressCommand]
