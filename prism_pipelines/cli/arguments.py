"""One grammar for all commands: how flags are written, what a help page looks like, and flags that several share."""

from __future__ import annotations

import argparse
import json
import math
import shutil
import textwrap
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

if TYPE_CHECKING:
    import torch

Commands: TypeAlias = "argparse._SubParsersAction[Any]"  # where `add_parser` of each command adds itself
WIDTH = 100  # columns of a help page, or fewer in a narrower terminal


def dashed(words: Sequence[str]) -> list[str]:
    """The words of a command line with `--num-samples` written as `--num-samples`. Values stay as they are.

    Example:
        >>> dashed(["--chat-template-kwargs={'a_b': 1}", "a_b", "--", "--a-b"])
        ["--chat-template-kwargs={'a_b': 1}", 'a_b', '--', '--a-b']
    """
    end = list(words).index("--") if "--" in words else len(words)
    return [_dashed(word) if i < end else word for i, word in enumerate(words)]


def _dashed(word: str) -> str:
    flag, equals, value = word.partition("=")
    return flag.replace("_", "-") + equals + value if word.startswith("--") else word


class OneLineErrors(argparse.ArgumentParser):
    """Reports a usage error in one line; argparse prints the whole usage before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


class Parser(OneLineErrors):
    """A parser of flags with dashes, which takes underscores as well."""

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]  # typeshed overloads it by the type of the namespace
        if args is not None and "-" in self.prefix_chars:  # `prism train` passes all words on as they are
            args = dashed(args)
        return super().parse_known_args(args, namespace)


def add_command(
    commands: Commands, name: str, run: Callable[[argparse.Namespace], int], usage: str, *, examples: str, **texts: str
) -> argparse.ArgumentParser:
    """Add the command `name` to `commands`; a parsed command line carries `run` in `args.run`.

    Args:
        usage: what follows the name, such as "MODEL --out FILE [FLAGS]".
        examples: command lines, one a line.
        texts: `help` (in the list of commands), `description` (default: `help`), and `status`, what
            the exit status says.
    """
    lines = "\n".join(f"  {line.strip()}" for line in examples.strip().splitlines())
    parser = commands.add_parser(
        name,
        usage=f"%(prog)s {usage}",
        help=texts["help"],
        description=textwrap.fill(texts.get("description", texts["help"][0].upper() + texts["help"][1:] + "."), WIDTH),
        epilog=f"examples:\n{lines}\n\nExit status: {texts.get('status', '0 done, 2 bad input.')}",
        formatter_class=page,
    )
    parser.set_defaults(run=run)
    return parser


def page(prog: str) -> argparse.HelpFormatter:
    """How a help page is laid out: at most `WIDTH` columns, examples as they are written."""
    columns = min(WIDTH, shutil.get_terminal_size((WIDTH, 24)).columns)
    return argparse.RawDescriptionHelpFormatter(prog, max_help_position=32, width=columns)


def number_type(kind: type[int] | type[float], low: float, words: str) -> Callable[[str], float]:
    """An argparse type: a finite `kind` (int or float) not below `low`, called `words` in the error."""

    def parse(text: str) -> float:
        try:
            value: float = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value < math.inf:
            raise argparse.ArgumentTypeError(f"must be {words}, got {text!r}")
        return value

    return parse


COUNT = number_type(int, 1, "a whole number of at least 1")
WHOLE = number_type(int, 0, "a whole number of at least 0")
NOT_NEGATIVE = number_type(float, 0, "a number of at least 0")
SECONDS = number_type(float, 0, "seconds of at least 0")


def scheduler_name(text: str) -> str:
    """An argparse type: a name that `schedulers.by_name.scheduler_class` knows."""
    from ..schedulers.by_name import scheduler_class

    try:
        return scheduler_class(text).__name__
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def add_scheduler_flags(group: argparse._ActionsContainer, config: bool = True) -> None:
    """`--scheduler`, and with `config` also `--scheduler-config`."""
    group.add_argument(
        "--scheduler",
        metavar="NAME",
        type=scheduler_name,
        help="prism, mdlm, remdm, self-confidence, ... (default: its own)",
    )
    if config:
        group.add_argument(
            "--scheduler-config", metavar="JSON", help="fields to set in it, such as '{\"num_remask\": 4}'"
        )


def add_seed_flag(group: argparse._ActionsContainer) -> None:
    group.add_argument("--seed", metavar="N", type=WHOLE, default=0, help="of all random choices (default: 0)")


def add_temperature_flags(group: argparse._ActionsContainer, top_p: bool = True) -> None:
    """`--temperature`, and `--top-p` too unless that is False."""
    group.add_argument(
        "--temperature", metavar="X", type=NOT_NEGATIVE, help="0: the likeliest token (default: the scheduler's)"
    )
    if top_p:
        group.add_argument("--top-p", metavar="P", type=float, help="nucleus, in (0, 1] (default: the scheduler's)")


def add_device_flag(group: argparse._ActionsContainer) -> None:
    group.add_argument("--device", metavar="NAME", help='"cpu", "cuda", ... (default: the GPU if there is one)')


def add_live_flags(parser: argparse.ArgumentParser, sampling: argparse._ActionsContainer, delay: float) -> None:
    """What `prism sudoku` and `prism text` share: the rest of their sampling flags, and how a run is shown."""
    add_temperature_flags(sampling, top_p=False)
    add_seed_flag(sampling)
    sampling.add_argument("--model", metavar="MODEL", help="folder or Hub id of a pipeline (default: the bundled one)")
    add_device_flag(sampling)
    output = parser.add_argument_group("output")
    output.add_argument("--html", metavar="FILE", help="write a self-contained page that steps through the run")
    output.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    output.add_argument("--no-live", action="store_true", help="no animation, only the result")
    output.add_argument(
        "--delay", metavar="X", type=SECONDS, default=delay, help="seconds a frame (default: %(default)s)"
    )


def check_device(name: str | None) -> torch.device:
    """The torch device of `--device`; without one the GPU if there is one, else the CPU.

    Raises:
        ValueError: there is no such device, or it is not available.
    """
    import torch

    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from None
    return device


def values(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    """The values of some flags, for a function whose arguments are called as the flags are."""
    return {name: getattr(args, name) for name in names}


def refuse(args: argparse.Namespace, flags: Sequence[str], why: str) -> None:
    """Name the first of these flags that was given.

    Raises:
        ValueError: one was.
    """
    for flag in flags:
        if getattr(args, flag[2:].replace("-", "_")) not in (None, 0):
            raise ValueError(f"{flag} has no effect {why}: leave it out.")


def show(result: dict[str, Any], args: argparse.Namespace, text: str | None = None) -> int:
    """Print a result as `--json` says, else `text`, else a line for each entry. Returns exit status 0."""
    if args.json:
        print(json.dumps(result))
    elif text is not None:
        print(text)
    else:
        for name, value in result.items():
            print(f"{name:20}{value:.4g}" if isinstance(value, float) else f"{name:20}{json.dumps(value)}")
    return 0
