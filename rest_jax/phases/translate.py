"""The translate phase: text in, text out, with any policy of a run."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from rest_jax import errors, files, keys
from rest_jax.generation.search import BeamConfig
from rest_jax.generation.translator import Translations, Translator
from rest_jax.phases.lineage import BC, PolicyName
from rest_jax.phases.workspace import Workspace
from rest_jax.types import EOS_ID, RaggedTokens

_LINES_AT_A_TIME = 1024


def newest_policy(workspace: Workspace) -> PolicyName:
    """The last sealed policy of the run.

    Raises:
      MissingInputError: there is none.
    """
    folder = workspace.run_dir / "policy"
    sealed = [path.name for path in folder.glob("*") if files.read_seal(path) is not None]
    if not sealed:
        workspace.require(workspace.policy_folder(BC), "pretrain")
    return max(PolicyName.parse(name) for name in sealed)


def translate(workspace: Workspace, policy: str | None, source: str, target: str, decoder: str) -> None:
    """Translates a file, or standard input, line by line and in order.

    Args:
      workspace: the run.
      policy: which policy; None takes the newest.
      source: a path, or "-" for standard input.
      target: a path, or "-" for standard output.
      decoder: "greedy", "beam" or "sample".
    """
    name = newest_policy(workspace) if policy is None else PolicyName.parse(policy)
    translator = workspace.translator(workspace.policy_params(name))
    if target == "-":
        for line in _translated(workspace, translator, _lines(source), decoder):
            print(line, flush=True)
        return
    with files.atomic_path(Path(target)) as temporary, open(temporary, "w", encoding="utf-8") as handle:
        for line in _translated(workspace, translator, _lines(source), decoder):
            handle.write(line + "\n")


def _lines(source: str) -> Iterator[str]:
    if source == "-":
        yield from (line.rstrip("\n") for line in sys.stdin)
        return
    if not Path(source).is_file():
        raise errors.MissingInputError(f"no file {source}", where="--input", remedy="Give a text file, or - ")
    with open(source, encoding="utf-8", newline="\n") as handle:
        yield from (line.rstrip("\r\n") for line in handle)


def _translated(
    workspace: Workspace, translator: Translator, lines: Iterator[str], decoder: str
) -> Iterator[str]:
    first = 0
    while block := [line for _, line in zip(range(_LINES_AT_A_TIME), lines, strict=False)]:
        sources = _encode(workspace, block)
        found = _decode(workspace, translator, sources, decoder, np.arange(first, first + len(block)))
        for row in range(len(block)):
            best = found.tokens[row * found.num_samples]
            # An empty line stays one, so that line numbers agree.
            yield workspace.vocabulary.decode(best.tolist()) if block[row].strip() else ""
        first += len(block)


def _encode(workspace: Workspace, lines: list[str]) -> RaggedTokens:
    limit = workspace.experiment.source_length
    encoded = workspace.vocabulary.encode_batch(lines)
    long = sum(len(tokens) >= limit for tokens in encoded)
    if long:
        workspace.logbook.say(f"{long} lines are longer than {limit} tokens; their ends are not translated")
    return RaggedTokens.from_lists([[*tokens[: limit - 1], EOS_ID] for tokens in encoded])


def _decode(
    workspace: Workspace, translator: Translator, sources: RaggedTokens, decoder: str, ids: np.ndarray
) -> Translations:
    settings = workspace.experiment.evaluation
    length = settings.sampling.max_length
    if decoder == "beam":
        return translator.beam(sources, settings.beam or BeamConfig(max_length=length))
    if decoder == "sample":
        key = keys.stream_key(workspace.experiment.seed, keys.Stream.TRANSLATE)
        return translator.sample(sources, ids, 1, key, settings.sampling)
    return translator.greedy(sources, length)
