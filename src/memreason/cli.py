"""The command line: words to one of the verbs, its errors to one line and an exit code."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn

from memreason.core.errors import MemreasonError, RecipeError
from memreason.verbs.table import GROUPS, VERBS

__all__ = ["main"]

EPILOG = """any field of a recipe can be given as a flag: {fields}"""
PUBLISHED = "the published argument lists of train.py and eval.py are accepted by train and eval as they are"


class _Parser(argparse.ArgumentParser):
    """A parser whose mistakes are errors of ours: one sentence, no usage text before it."""

    def error(self, message: str) -> NoReturn:
        raise RecipeError(f"{message}. See {self.prog} --help", "command line")


def _parser() -> argparse.ArgumentParser:
    about = "Fine-tune open LLMs so that every line of an answer says whether it is memory or reason."
    style: dict[str, Any] = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = _Parser(
        prog="memreason",
        description=about,
        epilog=f"{EPILOG.format(fields=VERBS['train'].fields)}\n{PUBLISHED}",
        **style,
    )
    top = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    groups: dict[str, Any] = {"": top}
    for name, verb in VERBS.items():
        group, _, last = name.rpartition(" ")
        if group not in groups:
            one = top.add_parser(group, help=GROUPS[group], description=GROUPS[group], **style)
            groups[group] = one.add_subparsers(dest="action", required=True, metavar="ACTION")
        epilog = EPILOG.format(fields=verb.fields) if verb.fields else None
        one = groups[group].add_parser(last, help=verb.text, description=verb.text, epilog=epilog, **style)
        for flag, settings in verb.arguments.items():
            one.add_argument(flag, **settings)
        one.set_defaults(function=verb.function)
    return parser


def _part(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """A verb's own words, and the recipe's fields with their values, which argparse would take for positionals."""
    size = 1 + (" ".join(words[:2]) in VERBS)  # "eval", "lm-eval tasks"
    verb = VERBS.get(" ".join(words[:size]))
    if verb is None or not verb.fields:
        return list(words), []
    own, fields = list(words[:size]), list[str]()
    rest = [word for word in words[size:] if word.strip()]  # a line break of a pasted command
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or word.partition("=")[0] in (*verb.arguments, "--help"):
            own.append(word)
            continue
        fields.append(word)
        if "=" not in word and rest and not rest[0].startswith("--"):
            fields.append(rest.pop(0))
    return own, fields


def _quiet() -> None:
    """Notices of the libraries that a user can do nothing about."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    for category in (UserWarning, FutureWarning):
        warnings.filterwarnings("ignore", category=category)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns its exit code: 0, 2 for what the user can mend, 130 after Ctrl-C."""
    _quiet()
    try:
        own, fields = _part(list(sys.argv[1:] if arguments is None else arguments))
        known = _parser().parse_args(own)
        known.function(known, fields)
    except MemreasonError as error:
        sys.stderr.write(f"error: {error}\n")  # in one piece: print would write the line break apart
        return 2
    except KeyboardInterrupt:
        print("\nstopped; run the same command again to go on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
