"""The flags that single verbs have beside those of all.

Floor 7.
"""

from __future__ import annotations

import argparse


def grow(parser: argparse.ArgumentParser) -> None:
    """Which Grow step."""
    parser.add_argument("--grow_step", type=int, default=1, help="g, from 1 (default 1)")


def improve(parser: argparse.ArgumentParser) -> None:
    """Which Improve step."""
    grow(parser)
    parser.add_argument(
        "--improve_step", type=int, default=1, help="i, from 1, or 0 for all of D_g (default 1)"
    )


def policy(parser: argparse.ArgumentParser) -> None:
    """Which policy."""
    parser.add_argument("--policy", default="bc", help="bc, g1_i2, ppo … (default bc)")


def translate(parser: argparse.ArgumentParser) -> None:
    """What is translated, with what."""
    parser.add_argument("--policy", default=None, help="bc, g1_i2, ppo … (default: the newest of the run)")
    parser.add_argument("--input", default="-", help="text, one sentence a line (default: standard input)")
    parser.add_argument("--output", default="-", help="where to write (default: standard output)")
    parser.add_argument("--decoder", choices=("greedy", "beam", "sample"), default="greedy")


def export(parser: argparse.ArgumentParser) -> None:
    """What is exported, and where to."""
    parser.add_argument("--policy", default=None, help="bc, g1_i2, ppo … (default: the newest of the run)")
    parser.add_argument("--format", choices=("hf",), default="hf")
    parser.add_argument("--output", required=True, help="folder to write")


def import_(parser: argparse.ArgumentParser) -> None:
    """What is imported."""
    parser.add_argument("--format", choices=("hf", "t5x"), default="hf")
    parser.add_argument("--input", required=True, help="folder to read")


def report(parser: argparse.ArgumentParser) -> None:
    """Which run, by its folder."""
    parser.add_argument("run", nargs="?", help="run folder (default: MODEL_DIR of the gin settings)")


def compare(parser: argparse.ArgumentParser) -> None:
    """Which runs, and where the tables go."""
    parser.add_argument("runs", nargs="+", help="run folders")
    parser.add_argument("--output", default="comparison", help="folder to write (default: comparison)")


def inspect(parser: argparse.ArgumentParser) -> None:
    """What is to be seen of a run."""
    report(parser)
    parser.add_argument("--grow_step", type=int, default=None, help="this g alone (default: all)")
    parser.add_argument("--source", default=None, help="an example id or a source: shows its samples")
    parser.add_argument("--search", default=None, help="finds sources and samples that contain this text")
    parser.add_argument("--limit", type=int, default=50, help="sources shown of a Grow step (default 50)")
    parser.add_argument("--html", default=None, help="writes one page to this file instead")


def verify(parser: argparse.ArgumentParser) -> None:
    """How much of a run is sampled again."""
    report(parser)
    parser.add_argument("--grow_step", type=int, default=None, help="draw of this g alone (default: all)")
    parser.add_argument("--share", type=float, default=0.01, help="share of the sources (default 0.01)")
    parser.add_argument("--seed", type=int, default=None, help="chooses the sources (default: new each time)")
