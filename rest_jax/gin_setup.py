"""The only module that knows gin: from gin files and bindings to one checked `Experiment`.

Floor 7. The configurable classes are the frozen dataclasses that stand beside the code they configure;
they are registered here, so no other module carries a gin decorator. A gin file holds no `import`: it is
data.

The whole experiment is built before any verb starts. What gin itself lets pass in silence is found here: a
binding that no object reads, a misspelt macro, a value of the wrong type, a required value that is missing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import os
import re
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gin

from rest_jax import errors
from rest_jax.data import corpora, vocabulary
from rest_jax.generation import batching, sampler, search
from rest_jax.network import config as network_config
from rest_jax.network import mesh
from rest_jax.objectives import actor_critic, filters, gold, guards, policy, ppo, selections, v_mpo
from rest_jax.objectives import values as value_losses
from rest_jax.phases import experiment, improve_settings, ppo_settings
from rest_jax.rewards import ratings
from rest_jax.training import optimizers, trainer

CONFIGURABLES: tuple[type, ...] = (
    corpora.HsgTatoebaCorpus,
    corpora.TsvCorpus,
    corpora.ParallelCorpus,
    corpora.TfdsCorpus,
    corpora.SeqioCorpus,
    vocabulary.VocabularyConfig,
    network_config.T5Config,
    mesh.MeshConfig,
    optimizers.OptimizerConfig,
    trainer.TrainerConfig,
    sampler.SamplingConfig,
    search.BeamConfig,
    batching.DecodeBatching,
    filters.ThresholdSchedule,
    selections.PercentileSchedule,
    selections.MeanMaxSchedule,
    selections.TopKSchedule,
    guards.GuardConfig,
    ratings.RaterConfig,
    policy.BehaviourCloningConfig,
    gold.GoldConfig,
    v_mpo.VMPOConfig,
    actor_critic.OACConfig,
    value_losses.BVEConfig,
    value_losses.ValueConfig,
    improve_settings.ValueFunctionConfig,
    experiment.RewardModelConfig,
    experiment.GrowConfig,
    improve_settings.ImproveConfig,
    experiment.EvaluationConfig,
    experiment.BestOfNConfig,
    ppo.PPOConfig,
    ppo_settings.PPOSettings,
    experiment.Experiment,
)
_NAMES = [cls.__name__ for cls in CONFIGURABLES]
_MACRO = "gin.macro"


def _register() -> None:
    for cls in CONFIGURABLES:
        if f"rest_jax.{cls.__name__}" not in gin.config._REGISTRY:
            gin.external_configurable(cls, name=cls.__name__, module="rest_jax")


def search_paths(extra: Sequence[str] = ()) -> list[str]:
    """Where gin files and their includes are looked for: the working folder, yours, then the source tree."""
    return ["", *extra, str(Path(__file__).resolve().parents[1])]


def load_experiment(
    gin_files: Sequence[str], bindings: Sequence[str] = (), gin_search_paths: Sequence[str] = ()
) -> experiment.Experiment:
    """Parses gin files and bindings, builds the experiment and checks that every binding was read.

    Args:
      gin_files: paths of gin files, later ones override earlier ones.
      bindings: `KEY=value` lines as they stand on the command line behind `--gin.`.
      gin_search_paths: further folders to look in.

    Raises:
      ConfigError: anything about the configuration is wrong; the message names the key and the remedy.
      MissingInputError: a gin file does not exist.
    """
    _register()
    gin.clear_config()
    paths = search_paths(gin_search_paths)
    for name in gin_files:
        _require_file(name, paths)
    with gin.unlock_config(), _replaced_objects_forgotten():
        _parse(gin_files, bindings, paths)
    _check_values()
    try:
        built = gin.get_configurable("Experiment")()
    except Exception as error:
        raise _without_gin_frames(error) from error
    _check_all_read()
    _check_types(built, "Experiment")
    return built


def operative_config() -> str:
    """The configuration as it was used, defaults included, as gin text; it is stored, never executed."""
    return gin.operative_config_str()


def _require_file(name: str, paths: Sequence[str]) -> None:
    if _find(name, paths) is not None:
        return
    known = [str(p) for p in Path("gin_configs").rglob("*.gin")]
    root = Path(__file__).resolve().parents[1]
    known += [str(p.relative_to(root)) for p in (root / "gin_configs").rglob("*.gin")]
    close = difflib.get_close_matches(name, known, n=1)
    hint = (
        f"Did you mean {close[0]}?"
        if close
        else "Give a path that exists, or its folder by --gin_search_paths"
    )
    raise errors.MissingInputError(f"no gin file {name}", where="--gin_file", remedy=hint)


def _parse(gin_files: Sequence[str], bindings: Sequence[str], paths: Sequence[str]) -> None:
    gin.config._LOCATION_PREFIXES[:] = list(paths)
    # Plain files only: gin's reader of package resources takes the folder gin_configs for a package.
    gin.config._FILE_READERS[:] = [(open, os.path.isfile)]
    for name in gin_files:
        text_file = _find(name, paths)
        assert text_file is not None  # _require_file saw it
        try:
            _refuse_code(text_file, paths, set())
            gin.parse_config_file(str(text_file))
        except errors.RestError:
            raise
        except Exception as error:
            raise _parse_error(error, str(text_file)) from error
    for binding in bindings:
        if not re.match(r"[\w./]+\s*=", binding):
            raise errors.ConfigError(
                f"{binding!r} is not KEY=value", where=f"--gin.{binding}", remedy=f"Write '--gin.{binding}=…'"
            )
        try:
            gin.parse_config(binding)
        except Exception as error:
            raise _parse_error(error, f"--gin.{binding}") from error


@contextlib.contextmanager
def _replaced_objects_forgotten() -> Iterator[None]:
    """While it lasts, an object that a later line replaces takes the bindings made for it along.

    A run file binds `ImproveConfig.selection = @ThresholdSchedule()` and its thresholds. Where a file behind
    it chooses another filter, the thresholds are not forgotten bindings but have gone with their schedule.
    Bindings that come after the replacement stay, and nothing reads them.
    """
    bind = gin.config.bind_parameter

    def binding(key: Any, value: Any) -> None:
        parsed = gin.config.ParsedBindingKey.parse(key)
        before = gin.config._CONFIG.get(parsed.config_key, {}).get(parsed.arg_name)
        bind(key, value)
        if not isinstance(before, gin.config.ConfigurableReference) or before.selector == _MACRO:
            return
        left = {reference.config_key for reference in _references()}
        scope, selector = before.config_key
        if scope and (scope, selector) not in left:
            gin.config._CONFIG.pop((scope, selector), None)
        if selector not in {other for _, other in left}:  # what has no scope holds in all of them
            gin.config._CONFIG.pop(("", selector), None)

    gin.config.bind_parameter = binding
    try:
        yield
    finally:
        gin.config.bind_parameter = bind


def _references() -> Iterator[Any]:
    """The references to objects that are bound at present."""
    for values in gin.config._CONFIG.values():
        for value in values.values():
            for inner in value if isinstance(value, (tuple, list)) else [value]:
                if isinstance(inner, gin.config.ConfigurableReference):
                    yield inner


def _find(name: str, paths: Sequence[str]) -> Path | None:
    return next((path for folder in paths if (path := Path(folder) / name).is_file()), None)


def _refuse_code(path: Path, paths: Sequence[str], seen: set[Path]) -> None:
    """Refuses `import` in a gin file and in all that it includes."""
    if path in seen:
        raise errors.ConfigError(f"{path} includes itself", where="gin", remedy="Delete that include line")
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        included = re.match(r"""\s*include\s+['"](.+)['"]""", line)
        if included and (inner := _find(included[1], paths)) is not None:
            _refuse_code(inner, paths, seen | {path})
        if re.match(r"\s*(import|from)\s", line):
            raise errors.ConfigError(
                f"a gin file may not import code: {line.strip()!r}",
                where=f"{path}:{number}",
                remedy="Delete the line; every class of rest_jax is already known to gin",
            )


def _parse_error(error: Exception, where: str) -> errors.ConfigError:
    """Turns what gin says of a line it cannot read into one line with a remedy."""
    text = " ".join(str(error).split())
    if match := re.search(r'In file "([^"]+)", line (\d+)', text):
        where = f"{match.group(1)}:{match.group(2)}"  # the innermost of files that include each other
    if match := re.search(r"No configurable matching '?([\w./]+)", text):
        return errors.ConfigError(
            f"no configurable {match.group(1)!r}", where=where, remedy=_close_to(match.group(1), _NAMES)
        )
    if match := re.search(r"Configurable '([\w.]+)' doesn't have a parameter named '(\w+)'", text):
        cls = next(cls for cls in CONFIGURABLES if cls.__name__ == match.group(1).rsplit(".", 1)[-1])
        fields = [field.name for field in dataclasses.fields(cls)]
        return errors.ConfigError(
            f"{match.group(1)} has no parameter {match.group(2)!r}",
            where=where,
            remedy=_close_to(match.group(2), fields),
        )
    if where.startswith("--gin."):
        key, _, value = where[len("--gin.") :].partition("=")
        return errors.ConfigError(
            f"cannot read {value!r} as the value of {key}",
            where=where,
            remedy=f"Text needs quotes of its own: '--gin.{key}=\"{value}\"'",
        )
    return errors.ConfigError(text, where=where, remedy="Correct the line that it names")


def _without_gin_frames(error: Exception) -> errors.RestError:
    """The error as it was raised, without the lines that gin appends to its message."""
    if isinstance(error, errors.RestError):
        kind = next(cls for cls in type(error).__mro__ if cls is getattr(errors, cls.__name__, None))
        return kind(error.what, where=error.where, remedy=error.remedy)
    line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if match := re.search(r"(\w+)\.__init__\(\) missing \d+ required .*?: (.*)", line):
        return errors.ConfigError(
            f"{match.group(1)} lacks {match.group(2)}",
            where="gin",
            remedy="Give a whole run, as in gin_configs/runs/, or include gin_configs/phases/rest.gin first",
        )
    return errors.ConfigError(line, where="gin", remedy="Correct the binding it names")


def _close_to(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name.rsplit("/", 1)[-1].rsplit(".", 1)[-1], known, n=1)
    return f"Did you mean {close[0]}?" if close else f"Known: {', '.join(known)}"


def _check_values() -> None:
    """Every value that a binding gives must have the type of the field, and required ones must be given."""
    for (scope, selector), values in gin.config._CONFIG.items():
        cls = next((cls for cls in CONFIGURABLES if selector == f"rest_jax.{cls.__name__}"), None)
        if cls is None:
            continue
        hints = typing.get_type_hints(cls)
        for field, value in values.items():
            key, literal = _resolved(f"{scope}/{cls.__name__}.{field}".lstrip("/"), value)
            if _is_required(literal):
                raise errors.ConfigError(
                    f"{key} has no value", where="gin", remedy=f"Give it: '--gin.{key}=…'"
                )
            if isinstance(literal, gin.config.ConfigurableReference) or _fits(literal, hints[field]):
                continue
            raise errors.ConfigError(
                f"{key} = {literal!r} is not {_type_name(hints[field])}",
                where="gin",
                remedy=f"{cls.__name__}.{field} needs that type",
            )


def _is_required(value: Any) -> bool:
    return isinstance(value, gin.config.ConfigurableReference) and value.scopes == ["gin.REQUIRED"]


def _resolved(key: str, value: Any) -> tuple[str, Any]:
    """Follows macros to the literal they stand for, and says which key holds it."""
    for _ in range(16):
        if not isinstance(value, gin.config.ConfigurableReference) or value.selector != _MACRO:
            break
        key = "/".join(value.scopes)
        bound = gin.config._CONFIG.get((key, _MACRO))
        if bound is None:
            raise errors.ConfigError(f"{key} has no value", where="gin", remedy=f"Give it: '--gin.{key}=…'")
        value = bound["value"]
    return key, value


def _check_all_read() -> None:
    """Every parsed binding must have been read by some object of the experiment."""
    unread = []
    for (scope, selector), values in gin.config._CONFIG.items():
        parts = scope.split("/") if scope else []
        for name in values:
            if not _was_read(parts, selector, name):
                prefix = f"{scope}/" if scope else ""
                short = scope if selector == _MACRO else f"{prefix}{selector.rsplit('.', 1)[-1]}.{name}"
                unread.append(short)
    if unread:
        close = difflib.get_close_matches(unread[0], _names_read(), n=1)
        raise errors.ConfigError(
            f"no part of the program reads {', '.join(sorted(unread))}, or it is overridden",
            where="gin",
            remedy=f"Did you mean {close[0]}? Else delete the binding"
            if close
            else "Correct or delete the binding",
        )


def _names_read() -> list[str]:
    """Every key that some object has read, as one writes it."""
    names = []
    for (scope, selector), used in gin.config._OPERATIVE_CONFIG.items():
        if selector == _MACRO:
            names.append(scope.rsplit("/", 1)[-1])
        else:
            prefix = f"{scope}/" if scope else ""
            names += [f"{prefix}{selector.rsplit('.', 1)[-1]}.{name}" for name in used]
    return names


def _was_read(scope: list[str], selector: str, name: str) -> bool:
    for (used_scope, used_selector), used in gin.config._OPERATIVE_CONFIG.items():
        if used_selector != selector or name not in used:
            continue
        used_parts = used_scope.split("/") if used_scope else []
        if selector == _MACRO:
            if used_parts[-len(scope) :] == scope:
                return True
        elif used_parts[: len(scope)] == scope:
            return True
    return False


def _check_types(value: Any, path: str) -> None:
    """Compares every field of a tree of dataclasses with its annotation."""
    hints = typing.get_type_hints(type(value))
    for field in dataclasses.fields(value):
        inner, expected = getattr(value, field.name), hints[field.name]
        if not _fits(inner, expected):
            raise errors.ConfigError(
                f"{path}.{field.name} is {inner!r}, which is not {_type_name(expected)}",
                where="gin",
                remedy=f"Give {type(value).__name__}.{field.name} a value of that type",
            )
        if dataclasses.is_dataclass(inner):
            _check_types(inner, f"{path}.{field.name}")


def _fits(value: Any, expected: Any) -> bool:
    origin = typing.get_origin(expected)
    arguments = typing.get_args(expected)
    if expected is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, option) for option in arguments)
    if origin is typing.Literal:
        return value in arguments
    if origin is tuple:
        items = (
            arguments[:1] * len(value)
            if isinstance(value, (tuple, list)) and Ellipsis in arguments
            else arguments
        )
        return isinstance(value, (tuple, list)) and len(items) == len(value) and all(map(_fits, value, items))
    if origin is dict:
        return isinstance(value, dict)
    if expected is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if expected is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if expected is None or expected is type(None):
        return value is None
    return isinstance(value, expected) if isinstance(expected, type) else True


def _type_name(expected: Any) -> str:
    return expected.__name__ if isinstance(expected, type) else str(expected).replace("typing.", "")
