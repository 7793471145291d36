"""The program: `rest-jax VERB --gin_file=F --gin.KEY=value`.

Floor 7. Flags and binding names are T5X's where it has them. A failure the user can mend prints one line that
names the thing and the remedy, and exits with the code of its kind (`rest_jax.errors`).
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # TensorFlow and TensorStore speak only of errors

from rest_jax import errors  # noqa: E402
from rest_jax.start import Arguments  # noqa: E402
from rest_jax.verbs import VERBS  # noqa: E402

EPILOG = """\
settings:
  --gin_file=F            a gin file; may be given several times, later ones override
  --gin.KEY=value         one binding, for instance '--gin.MODEL_DIR="run"' --gin.SEED=1
  --gin_search_paths=A,B  further folders to look for gin files in
"""


def make_parser() -> argparse.ArgumentParser:
    """The command line: verbs, and the flags that all of them take."""
    parser = argparse.ArgumentParser(
        prog="rest-jax",
        description="ReST (Reinforced Self-Training, arXiv:2308.08998) for machine translation",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, verb in VERBS.items():
        sub = verbs.add_parser(
            name,
            help=verb.does,
            description=f"{verb.does}\n\nreads:  {verb.reads}\nwrites: {verb.writes}",
            epilog=EPILOG,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        sub.add_argument("--gin_file", action="append", default=[], help=argparse.SUPPRESS)
        sub.add_argument(
            "--gin_search_paths", default=[], type=lambda text: text.split(","), help=argparse.SUPPRESS
        )
        group = sub.add_argument_group("several processes (found by itself on a TPU pod)")
        group.add_argument("--multiprocess", action="store_true", help="join the job's other processes")
        group.add_argument("--coordinator_address", default=None, help="host:port of process 0")
        group.add_argument("--process_count", type=int, default=None)
        group.add_argument("--process_index", type=int, default=None)
        verb.flags(sub)
    return parser


def parse(arguments: Sequence[str]) -> Arguments:
    """Reads the command line; `--gin.KEY=value` flags are collected in `bindings`."""
    bindings = [a[len("--gin.") :] for a in arguments if a.startswith("--gin.")]
    parsed = make_parser().parse_args([a for a in arguments if not a.startswith("--gin.")])
    parsed.bindings = bindings
    return parsed


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a verb and returns the exit code."""
    parsed = parse(sys.argv[1:] if arguments is None else arguments)
    try:
        VERBS[parsed.verb].run(parsed)
    except errors.RestError as error:
        print(f"rest_jax: E{error.exit_code} {parsed.verb}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"rest_jax: {parsed.verb} was interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    except Exception as error:
        traceback.print_exc()
        print(f"rest_jax: E70 {parsed.verb}: {type(error).__name__}: {error}", file=sys.stderr)
        return 70
    return 0


if __name__ == "__main__":
    sys.exit(main())
