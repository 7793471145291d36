"""The run folder as the phases see it: where things are, what is sealed, and how a step is run once.

Floor 6.
"""

from __future__ import annotations

import datetime
import functools
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax

import rest_jax
from rest_jax import errors, files, processes
from rest_jax.data import examples, vocabulary
from rest_jax.generation import translator
from rest_jax.network import init, mesh
from rest_jax.phases.experiment import Experiment
from rest_jax.phases.lineage import PolicyName
from rest_jax.training import checkpoints, logbook
from rest_jax.types import Examples, Params

SPLITS = ("train", "rater", "valid", "test")


class Workspace:
    """One run: its experiment, its folder, and what is loaded from it.

    Raises:
      ConfigError: there is no folder of the base run.
    """

    def __init__(self, experiment: Experiment):
        errors.require(
            experiment.base_run is None or Path(experiment.base_run).is_dir(),
            f"no run folder {experiment.base_run}",
            "BASE_RUN",
            "Do that run first, name another whose first steps are the same, or set BASE_RUN = None",
        )
        self.experiment = experiment
        self.run_dir = Path(experiment.model_dir).absolute()
        self._policies: dict[PolicyName, Params] = {}

    # Where things are.

    @property
    def text_folder(self) -> Path:
        """Tokenised splits."""
        return self.run_dir / "data"

    @property
    def vocabulary_folder(self) -> Path:
        """The SentencePiece model."""
        return self.run_dir / "vocab"

    @property
    def vocabulary_file(self) -> Path:
        """The SentencePiece model's file."""
        return self.vocabulary_folder / "spm.model"

    @property
    def ratings_folder(self) -> Path:
        """What the reward model is trained on."""
        return self.run_dir / "reward" / "ratings"

    @property
    def reward_folder(self) -> Path:
        """The reward model."""
        return self.run_dir / "reward" / "model"

    @property
    def dataset_rewards_folder(self) -> Path:
        """The rewards of the original data D."""
        return self.run_dir / "reward" / "dataset"

    def policy_folder(self, name: PolicyName) -> Path:
        """A policy's checkpoint and its story."""
        return self.run_dir / "policy" / name.folder

    def grow_folder(self, grow: int) -> Path:
        """The samples of a Grow step."""
        return self.run_dir / "grow" / f"g{grow}"

    def grow_rewards_folder(self, grow: int) -> Path:
        """The rewards of those samples."""
        return self.grow_folder(grow) / "rewards" / self.experiment.reward.kind

    def value_folder(self, grow: int) -> Path:
        """The value function of a Grow step's behaviour policy."""
        return self.run_dir / "value" / f"g{grow}"

    def evaluation_folder(self, name: PolicyName) -> Path:
        """What was measured of a policy."""
        return self.run_dir / "eval" / name.folder

    def sample_folder(self, name: PolicyName) -> Path:
        """Samples of a policy for the sources of the split of `BestOfNConfig`."""
        return self.run_dir / "samples" / f"{name.folder}_{self.experiment.best_of_n.split}"

    def best_of_n_folder(self, name: PolicyName) -> Path:
        """What choosing among those samples gains."""
        return self.run_dir / "best_of_n" / f"{name.folder}_{self.experiment.best_of_n.split}"

    # What is loaded.

    @functools.cached_property
    def logbook(self) -> logbook.Logbook:
        """Where metrics go."""
        return logbook.Logbook(self.run_dir)

    @functools.cached_property
    def mesh(self) -> jax.sharding.Mesh:
        """The devices."""
        return mesh.make_mesh(self.experiment.mesh)

    @functools.cached_property
    def vocabulary(self) -> vocabulary.Vocabulary:
        """The run's vocabulary; checked against the network's."""
        self.require(self.vocabulary_folder, "vocab")
        loaded = vocabulary.Vocabulary.from_file(self.vocabulary_file)
        check_vocabulary_fits(loaded.size, self.experiment.policy.vocab_size)
        return loaded

    @functools.lru_cache(maxsize=8)  # noqa: B019 (a workspace lives as long as the program)
    def split(self, name: str) -> Examples:
        """The tokenised examples of a split."""
        self.require(self.text_folder, "vocab")
        path = self.text_folder / f"{name}.parquet"
        if not path.is_file():
            raise errors.MissingInputError(
                f"the corpus has no {name!r} split", where=str(path), remedy="Give the corpus such a split"
            )
        return examples.read_examples(path)

    def policy_params(self, name: PolicyName) -> Params:
        """The parameters of a sealed policy."""
        if name not in self._policies:
            folder = self.policy_folder(name)
            self.require(folder, name.phase)
            layout = layout_of(self.mesh, init.abstract_params(self.experiment.policy))
            self._policies = {name: checkpoints.load_params(folder / "params", layout)}
        return self._policies[name]

    def translator(self, params: Params) -> translator.Translator:
        """A translator with these parameters."""
        return translator.Translator(
            self.experiment.policy,
            params,
            mesh=self.mesh,
            batching=self.experiment.decoding,
            allowed_vocab_size=self.vocabulary.size,
        )

    # What is sealed.

    def require(self, folder: Path, phase: str) -> files.Seal:
        """The seal of an input folder.

        Raises:
          MissingInputError: it is not there; the message names the verb that makes it.
        """
        seal = files.read_seal(folder)
        if seal is None:
            raise errors.MissingInputError(
                f"{folder} is missing or unfinished",
                where=str(self.run_dir),
                remedy=f"Run `rest-jax {phase}` first, or `rest-jax rest` for the whole job",
            )
        return seal

    def digest(self, folder: Path, phase: str) -> str:
        """The digest of an input folder, for the identity of what is made from it."""
        return self.require(folder, phase).digest

    def run_step(
        self,
        folder: Path,
        phase: str,
        identity: Mapping[str, Any],
        work: Callable[[], Mapping[str, Any]],
        scratch: tuple[str, ...] = (),
        repairs_itself: bool = False,
    ) -> files.Seal:
        """Runs a step once: a sealed folder of the same identity is verified and left as it is.

        Args:
          folder: what the step writes; half-finished work in it is the step's own to resume.
          phase: the verb.
          identity: what the output depends on: settings, inputs' digests, the seed.
          work: does it, and returns the facts to keep with the seal.
          scratch: names in the folder that are not part of the artefact.
          repairs_itself: whether `work` finds damaged files of its own and makes just those anew; then a
            damaged folder is mended here, and has the digest it had before.

        Raises:
          ConfigError: the folder holds output of another identity.
        """
        name = folder.relative_to(self.run_dir).as_posix()
        whole_identity = self.identity(phase, identity)
        self._adopt(folder, whole_identity)
        digest = self._claim(folder, whole_identity, repairs_itself)
        if files.read_seal(folder) is None:
            started = time.monotonic()
            facts = dict(work())
            processes.barrier(f"worked:{name}")
            if processes.is_lead():
                facts |= {"seconds": round(time.monotonic() - started, 1), "versions": versions()}
                files.write_seal(folder, phase, digest, facts, skip=scratch)
            processes.barrier(f"sealed:{name}")
        seal = files.verify_seal(folder)
        if processes.is_lead():
            self._enter(name, seal)
        return seal

    def run_part(
        self, folder: Path, phase: str, identity: Mapping[str, Any], work: Callable[[], None]
    ) -> None:
        """Does one job's part of a step that repairs itself; other jobs may do theirs at the same time.

        Nothing is sealed and no line goes into the ledger: a whole run does that when the jobs are done.

        Args:
          folder: what the step writes.
          phase: the verb.
          identity: as for `run_step`.
          work: makes what is missing of the part.

        Raises:
          ConfigError: the folder holds output of another identity.
        """
        self._claim(folder, self.identity(phase, identity), repairs_itself=True)
        if files.read_seal(folder) is None:
            work()
        else:
            self.logbook.say(
                f"{folder.relative_to(self.run_dir).as_posix()} is sealed: nothing is left to do"
            )

    def identity(self, phase: str, identity: Mapping[str, Any]) -> dict[str, Any]:
        """What the output of a step depends on, the phase and the run's seed included."""
        return {"phase": phase, "seed": self.experiment.seed, **identity}

    def _adopt(self, folder: Path, identity: Mapping[str, Any]) -> None:
        """Takes the step over from the base run, if that has made it from the same things."""
        base = self.experiment.base_run
        if base is not None and processes.is_lead():
            name = folder.relative_to(self.run_dir)
            digest = files.digest_of(json.loads(files.canonical_json(identity)))
            if files.adopt(folder, Path(base).absolute() / name, digest):
                self.logbook.say(
                    f"{name.as_posix()} is taken over from {base}: it was made from the same things"
                )
        processes.barrier(f"adopted:{folder}")

    def _claim(self, folder: Path, identity: Mapping[str, Any], repairs_itself: bool) -> str:
        """Marks the folder, takes the seal off a damaged one that can be mended, and returns the digest."""
        if processes.is_lead():
            with files.turn(self.run_dir):
                files.claim(folder, identity)
                if repairs_itself:
                    self._unseal_if_damaged(folder)
        processes.barrier(f"claimed:{folder}")
        return files.digest_of(json.loads(files.canonical_json(identity)))

    def _unseal_if_damaged(self, folder: Path) -> None:
        if files.read_seal(folder) is not None:
            try:
                files.verify_seal(folder)
            except errors.IntegrityError as error:
                self.logbook.say(f"{error.what}: making it anew")
                (folder / files.SEAL_NAME).unlink()

    def _enter(self, name: str, seal: files.Seal) -> None:
        """Appends a sealed step to the ledger, unless it stands there already."""
        path = self.run_dir / "ledger.jsonl"
        entries = read_ledger(self.run_dir)
        if any(entry["step"] == name and entry["digest"] == seal.digest for entry in entries):
            return
        entry = {
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "step": name,
            "phase": seal.phase,
            "seconds": seal.facts.get("seconds"),
            "identity": seal.identity,
            "digest": seal.digest,
            "facts": dict(seal.facts),
        }
        lines = [json.dumps(e, ensure_ascii=False) for e in [*entries, entry]]
        files.write_text(path, "\n".join(lines) + "\n")


def layout_of(devices: jax.sharding.Mesh, abstract_boxed: Any) -> Any:
    """Shapes, dtypes and shardings of parameters, from their boxed abstract values."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        nn.meta.unbox(abstract_boxed),
        mesh.param_shardings(devices, abstract_boxed),
    )


def read_ledger(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of a run's ledger."""
    path = run_dir / "ledger.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def versions() -> dict[str, str]:
    """The versions that a result may depend on."""
    device = jax.devices()[0]
    return {"rest_jax": rest_jax.__version__, "jax": jax.__version__, "device": device.device_kind}


def check_vocabulary_fits(size: int, vocab_size: int) -> None:
    """The network's table must hold the vocabulary; spare rows are never sampled.

    Raises:
      ConfigError: it does not.
    """
    if size > vocab_size:
        raise errors.ConfigError(
            f"the vocabulary has {size} pieces and the network's table {vocab_size} rows",
            where="T5Config.vocab_size",
            remedy=f"Give T5Config.vocab_size at least {size}",
        )
