"""Every gin file of the tree builds an experiment, and every way to get a setting wrong has its own line."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from rest_jax import errors, gin_setup
from rest_jax.objectives import filters, selections
from rest_jax.phases.experiment import Experiment

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "gin_configs"
ALL_FILES = sorted(path.relative_to(ROOT).as_posix() for path in CONFIGS.rglob("*.gin"))
RUNS = [name for name in ALL_FILES if name.startswith("gin_configs/runs/")]
FRAGMENTS = [name for name in ALL_FILES if name.split("/")[1] not in ("runs", "phases")]
DEMO = "gin_configs/runs/rest_demo_zh_en.gin"
TINY = "tests/testdata/tiny.gin"
TINY_BINDINGS = ('MODEL_DIR="run"', 'TRAIN_TSV="pairs.tsv"')

# A value for each macro that a file may leave to the user.
GIVEN = {
    "TASK_FEATURE_LENGTHS": '{"inputs": 64, "targets": 64}',
    "SOURCE_LANGUAGE": '"en"',
    "TARGET_LANGUAGE": '"de"',
    "LANGUAGES": '("en", "de")',
    **dict.fromkeys(("VOCAB_SIZE", "TRAIN_STEPS", "BATCH_SIZE", "SAMPLES_PER_SOURCE"), "64"),
}


def text_with_includes(name: str) -> str:
    """The text of a gin file with that of what it includes in place of the include lines."""
    text = (ROOT / name).read_text(encoding="utf-8")
    return re.sub(
        r"""^include\s+['"](.+?)['"]""", lambda match: text_with_includes(match[1]), text, flags=re.MULTILINE
    )


def bindings_for(*names: str) -> list[str]:
    """A value for every macro that these files need and do not give; text where nothing else is known."""
    values = {
        match[1]: match[2].split("#")[0].strip()
        for name in names
        for match in re.finditer(r"^([A-Z][A-Z0-9_]*)\s*=\s*(.+)$", text_with_includes(name), re.MULTILINE)
    }
    needed = [macro for macro, value in values.items() if value == "%gin.REQUIRED"]
    return [f"{macro}={GIVEN.get(macro, repr('some/' + macro.lower()))}" for macro in needed]


def load(*names: str, bindings: Sequence[str] = ()) -> Experiment:
    return gin_setup.load_experiment(names, [*bindings_for(*names), *bindings])


def line_of(names: Sequence[str], *bindings: str) -> str:
    """The message of the error that loading ends with; it is one line."""
    with pytest.raises((errors.ConfigError, errors.MissingInputError)) as raised:
        gin_setup.load_experiment(names, bindings)
    line = str(raised.value)
    assert "\n" not in line
    return line


# What is in the tree.


def test_the_tree_has_run_files_and_fragments():
    assert DEMO in RUNS
    assert {name.split("/")[1] for name in ALL_FILES} >= {"runs", "networks", "tasks", "rewards", "hardware"}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_file_builds_an_experiment(name):
    experiment = load(name)
    assert isinstance(experiment, Experiment)
    assert experiment.improve.steps_of(1) >= 1


def test_every_file_of_phases_is_part_of_a_run():
    phases = {name for name in ALL_FILES if name.startswith("gin_configs/phases/")}
    included = {
        match for name in RUNS for match in re.findall(r"gin_configs/phases/\w+\.gin", included_by(name))
    }
    assert included == phases


def included_by(name: str) -> str:
    """All include lines below a gin file."""
    text = (ROOT / name).read_text(encoding="utf-8")
    inner = re.findall(r"""^include\s+['"](.+?)['"]""", text, flags=re.MULTILINE)
    return "\n".join([*inner, *map(included_by, inner)])


@pytest.mark.parametrize("name", RUNS)
def test_a_run_file_says_in_its_head_what_to_expect(name):
    head = "".join(line for line in (ROOT / name).read_text().splitlines(True) if line.startswith("#"))
    for word in ("command", "hardware", "time|hours", "expect"):
        assert re.search(rf"^#\s+({word})\s", head, re.MULTILINE), f"{name} does not say: {word}"
    assert name in head


@pytest.mark.parametrize("name", FRAGMENTS)
def test_a_fragment_takes_the_place_of_its_like_in_a_run(name, tmp_path):
    """The tiny run, with the fragment in the place of the one of its kind."""
    kind = name.split("/")[1]
    base = (ROOT / TINY).read_text(encoding="utf-8")
    text, count = re.subn(rf"include 'gin_configs/{kind}/\w+\.gin'", f"include '{name}'", base)
    if not count:  # the tiny run sets its network itself
        text = f"{base}\ninclude '{name}'\n"
    if kind == "tasks":
        text = re.sub(
            r"^(TsvCorpus\.\w+|SOURCE_LANGUAGE|TARGET_LANGUAGE)\s*=.*$", "", text, flags=re.MULTILINE
        )
    file = tmp_path / "run.gin"
    file.write_text(text, encoding="utf-8")
    needed = bindings_for(name, "gin_configs/phases/rest.gin")
    mine = [b for b in needed if not re.search(rf"^{b.split('=')[0]}\s*=", text, re.MULTILINE)]
    if "TRAIN_TSV" in text_with_includes_of(text):
        mine = [*[b for b in mine if not b.startswith("TRAIN_TSV")], TINY_BINDINGS[1]]
    experiment = gin_setup.load_experiment([str(file)], mine)
    assert isinstance(experiment, Experiment)


def text_with_includes_of(text: str) -> str:
    names = re.findall(r"""^include\s+['"](.+?)['"]""", text, flags=re.MULTILINE)
    return text + "".join(text_with_includes(name) for name in names)


@pytest.mark.parametrize("name", [n for n in FRAGMENTS if n.split("/")[1] != "tasks"])
def test_a_fragment_may_follow_the_demo(name):
    assert isinstance(load(DEMO, name), Experiment)


def test_a_filter_that_is_replaced_takes_its_settings_along():
    of_demo = load(DEMO).improve.selection
    assert of_demo == filters.ThresholdSchedule(quantiles=(0.6, 0.8))
    percentile = load(DEMO, "gin_configs/filters/percentile.gin").improve
    assert percentile.selection == selections.PercentileSchedule((0.75, 0.9, 0.95))
    assert (percentile.steps_of(1), percentile.steps_of(2)) == (3, 3)
    top = load(DEMO, "gin_configs/filters/percentile.gin", "gin_configs/filters/top_k.gin").improve
    assert (top.selection, top.dataset) == (selections.TopKSchedule((1,)), "none")
    em = load(DEMO, "gin_configs/filters/rest_em.gin").improve
    assert (em.selection, em.max_per_source) == (filters.ThresholdSchedule(values=(0.5,)), 10)


def test_a_setting_that_comes_after_its_filter_was_replaced_is_named():
    with pytest.raises(errors.ConfigError, match=r"no part of the program reads ThresholdSchedule\.values"):
        load(DEMO, "gin_configs/filters/top_k.gin", bindings=["ThresholdSchedule.values = (0.5,)"])
    with pytest.raises(errors.ConfigError, match=r"no part of the program reads TopKSchedule\.counts"):
        load(DEMO, bindings=["TopKSchedule.counts = (2, 1)"])


def test_later_grow_steps_may_have_filters_of_their_own():
    given = [
        "ImproveConfig.later_selection = @later/ThresholdSchedule()",
        "later/ThresholdSchedule.quantiles = (0.9,)",
        "GuardConfig.length_ratio = (0.5, 2.0)",
        "ImproveConfig.model_share = 0.75",
    ]
    improve = load(DEMO, bindings=given).improve
    assert improve.selection == filters.ThresholdSchedule(quantiles=(0.6, 0.8))
    assert improve.later_selection == filters.ThresholdSchedule(quantiles=(0.9,))
    assert [improve.steps_of(grow) for grow in (1, 2, 3)] == [2, 1, 1]
    assert improve.guards.length_ratio == (0.5, 2.0)
    # Its unscoped settings are still read by the later filter when the first is replaced.
    mixed = load(
        DEMO,
        bindings=[given[0], "ImproveConfig.selection = @TopKSchedule()", "TopKSchedule.counts = (2,)"],
    ).improve
    assert mixed.selection_of(1) == selections.TopKSchedule((2,))
    assert mixed.selection_of(2) == filters.ThresholdSchedule(quantiles=(0.6, 0.8))


def test_networks_have_the_sizes_of_the_papers():
    def sizes(name: str) -> tuple[int, ...]:
        c = load(DEMO, f"gin_configs/networks/{name}.gin").policy
        return c.num_encoder_layers, c.num_decoder_layers, c.emb_dim, c.mlp_dim, c.num_heads, c.head_dim

    # ReST, A.3.
    assert sizes("iwslt")[:5] == (6, 6, 512, 1024, 4)
    assert sizes("wmt")[:5] == (6, 6, 512, 2048, 8)
    assert sizes("web_domain")[:5] == (6, 6, 1024, 8192, 16)
    # T5 1.1, as released.
    assert sizes("t5_1_1_small") == (8, 8, 512, 1024, 6, 64)
    assert sizes("t5_1_1_base") == (12, 12, 768, 2048, 12, 64)
    assert sizes("t5_1_1_large") == (24, 24, 1024, 2816, 16, 64)
    assert sizes("t5_1_1_xl") == (24, 24, 2048, 5120, 32, 64)
    assert sizes("t5_1_1_xxl") == (24, 24, 4096, 10240, 64, 64)


# What loading promises.


def test_macros_reach_what_they_are_for():
    built = gin_setup.load_experiment(
        [TINY],
        [*TINY_BINDINGS, "SEED=7", "TRAIN_STEPS=11", "BATCH_SIZE=4", "GROW_STEPS=3", "SAMPLES_PER_SOURCE=5"],
    )
    assert (built.model_dir, built.seed, built.grow_steps) == ("run", 7, 3)
    assert (built.pretrain.train_steps, built.pretrain.batch_size) == (11, 4)
    assert (built.improve.trainer.batch_size, built.grow.samples_per_source) == (4, 5)
    assert built.corpus.train == "pairs.tsv"
    assert built.policy.vocab_size == built.vocabulary.size == 360


def test_scopes_keep_the_three_trainers_apart():
    built = gin_setup.load_experiment([TINY], TINY_BINDINGS)
    trainers = built.pretrain, built.reward.trainer, built.improve.trainer
    assert [t.train_steps for t in trainers] == [200, 120, 40]
    assert [t.optimizer.learning_rate for t in trainers] == [5e-3, 5e-3, 2e-3]
    assert [t.best_metric for t in trainers] == ["valid/loss", "valid/loss", "valid/reward"]
    assert [t.evaluate_first for t in trainers] == [False, False, True]


def test_later_files_and_bindings_override_earlier_ones(tmp_path):
    (tmp_path / "more.gin").write_text("SEED = 5\nTRAIN_STEPS = 6\n")
    built = gin_setup.load_experiment(
        [TINY, "more.gin"], [*TINY_BINDINGS, "TRAIN_STEPS=7"], gin_search_paths=[str(tmp_path)]
    )
    assert (built.seed, built.pretrain.train_steps) == (5, 7)


def test_nothing_lingers_from_one_load_to_the_next():
    first = gin_setup.load_experiment([TINY], TINY_BINDINGS)
    gin_setup.load_experiment([TINY], [*TINY_BINDINGS, "SEED=99", "T5Config.emb_dim=64"])
    line_of([TINY], *TINY_BINDINGS, "NO_SUCH_KEY=1")
    assert gin_setup.load_experiment([TINY], TINY_BINDINGS) == first


@pytest.mark.parametrize("name", [DEMO, TINY])
def test_the_stored_configuration_gives_the_same_experiment(name, tmp_path):
    built = load(name)
    (tmp_path / "config.gin").write_text(gin_setup.operative_config(), encoding="utf-8")
    assert gin_setup.load_experiment([str(tmp_path / "config.gin")]) == built


def test_the_stored_configuration_states_the_defaults_too():
    load(DEMO)
    text = gin_setup.operative_config()
    assert "ImproveConfig.dataset = 'filtered'" in text
    assert "SamplingConfig.top_k = 0" in text


def test_an_experiment_is_frozen():
    built = gin_setup.load_experiment([TINY], TINY_BINDINGS)
    with pytest.raises(dataclasses.FrozenInstanceError):
        built.seed = 1  # type: ignore[misc]


# What goes wrong.

MISTAKES = {
    "unknown macro": ("NO_SUCH_KEY=1", "no part of the program reads NO_SUCH_KEY", "delete the binding"),
    "misspelt macro": (
        "TRAIN_STEP=5",
        "no part of the program reads TRAIN_STEP, or it is overridden ",
        "Did you mean TRAIN_STEPS?",
    ),
    "misspelt class": ("T5Confg.emb_dim=64", "no configurable 'T5Confg'", "Did you mean T5Config?"),
    "misspelt parameter": ("T5Config.emb_dims=64", "has no parameter 'emb_dims'", "Did you mean emb_dim?"),
    "misspelt scope": (
        "pretrian/TrainerConfig.log_period=5",
        "no part of the program reads pretrian/TrainerConfig.log_period",
        "Did you mean pretrain/TrainerConfig.log_period?",
    ),
    "class that the run does not use": (
        "HsgTatoebaCorpus.seed=1",
        "no part of the program reads HsgTatoebaCorpus.seed",
        "delete the binding",
    ),
    "unquoted text": (
        "MODEL_DIR=run",
        "cannot read 'run' as the value of MODEL_DIR",
        "'--gin.MODEL_DIR=\"run\"'",
    ),
    "unquoted path": ("MODEL_DIR=/a/b", "cannot read '/a/b' as the value of MODEL_DIR", '"/a/b"'),
    "no value": ("SEED=", "cannot read '' as the value of SEED", "--gin.SEED="),
    "no equals sign": ("SEED", "'SEED' is not KEY=value", "'--gin.SEED=…'"),
    "text for a number through a macro": ("TRAIN_STEPS='many'", "TRAIN_STEPS = 'many' is not int", ""),
    "fraction for a whole number": ("T5Config.emb_dim=64.5", "T5Config.emb_dim = 64.5 is not int", ""),
    "truth for a number": ("T5Config.emb_dim=True", "T5Config.emb_dim = True is not int", ""),
    "number for text": ("MODEL_DIR=3", "MODEL_DIR = 3 is not str", ""),
    "word that is none of the choices": ("RewardModelConfig.kind='bertscore'", "'bertscore'", "learned"),
    "number for a list": ("DecodeBatching.source_lengths=64", "DecodeBatching.source_lengths = 64", ""),
    "thresholds that fall": (
        "ThresholdSchedule.quantiles=(0.8, 0.6)",
        "threshold list falls: 0.8 then 0.6 [ThresholdSchedule.quantiles]",
        "strictly rising",
    ),
    "thresholds that stay": (
        "ThresholdSchedule.quantiles=(0.8, 0.8)",
        "threshold list does not rise",
        "rising",
    ),
    "both kinds of thresholds": (
        "ThresholdSchedule.values=(0.8,)",
        "both values and quantiles",
        "exactly one",
    ),
    "threshold out of range": ("ThresholdSchedule.quantiles=(0.8, 1.2)", "1.2 is not in [0, 1]", ""),
    "length ratio the wrong way round": (
        "GuardConfig.length_ratio=(2.0, 0.5)",
        "(2.0, 0.5) is not a pair (low, high) with 0 <= low < high [GuardConfig.length_ratio]",
        "like (0.5, 2.0)",
    ),
    "cap that keeps nothing": ("ImproveConfig.max_per_source=0", "a cap of 0 keeps nothing", "at least 1"),
    "model share out of range": ("ImproveConfig.model_share=1.5", "1.5 is not in [0, 1]", "natural union"),
    "unknown use of D": ("ImproveConfig.dataset='all'", "'all'", "filtered"),
    "share out of range": ("T5Config.dropout_rate=1.5", "1.5", ""),
    "count out of range": ("GROW_STEPS=-1", "grow_steps is -1 [GROW_STEPS]", "0 or more"),
    "seed out of range": ("SEED=-1", "seed -1 is out of range [SEED]", "2**63"),
    "temperature out of range": ("SamplingConfig.temperature=-0.5", "-0.5", ""),
    "unknown optimizer": ("pretrain/OptimizerConfig.name='adamm'", "adamm", "adamw"),
    "lengths without a side": ('TASK_FEATURE_LENGTHS={"inputs": 32}', "TASK_FEATURE_LENGTHS", '"targets"'),
    "macro without a value": ("SEED=%NOT_GIVEN", "NOT_GIVEN has no value", "'--gin.NOT_GIVEN=…'"),
    "sources that fit no bucket": (
        "DecodeBatching.source_lengths=(8, 16)",
        "longest bucket holds 16",
        "DecodeBatching.source_lengths",
    ),
    "code": ("import os", "'import os' is not KEY=value", ""),
    "code in a value": ("SEED=__import__('os').getpid()", "as the value of SEED", ""),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named_with_its_remedy(mistake):
    binding, what, remedy = MISTAKES[mistake]
    line = line_of([TINY], *TINY_BINDINGS, binding)
    assert what in line
    assert remedy in line
    assert len(line) > len(what) + len(remedy)


@pytest.mark.parametrize(
    "name,close",
    [
        ("gin_configs/runs/rest_demo_zh_em.gin", DEMO),
        ("gin_config/networks/wmt.gin", "gin_configs/networks/wmt.gin"),
    ],
)
def test_a_misspelt_file_is_named_with_the_one_that_was_meant(name, close):
    line = line_of([name])
    assert f"no gin file {name}" in line
    assert f"Did you mean {close}?" in line


def test_a_file_like_no_other_is_named():
    assert "no gin file zzz [--gin_file]. Give a path that exists" in line_of(["zzz"])


def test_a_required_value_that_is_missing_is_named():
    assert "TRAIN_TSV has no value" in line_of([TINY], TINY_BINDINGS[0])
    assert "MODEL_DIR has no value" in line_of([TINY], TINY_BINDINGS[1])


def test_no_file_at_all_is_told_what_to_give():
    assert "gin_configs/runs/" in line_of([])


def test_a_fragment_alone_is_told_what_to_give():
    assert "gin_configs/runs/" in line_of(["gin_configs/networks/wmt.gin"])


BAD_LINES = {
    "import os": "may not import code",
    "from os import path": "may not import code",
    "T5Config.emb_dim = ": "bad.gin",
    "T5Config.emb_dim 64": "bad.gin",
    "T5Confg.emb_dim = 64": "Did you mean T5Config?",
    "include 'gone.gin'": "gone.gin",
    "MODEL_DIR = run": "bad.gin",
}


@pytest.mark.parametrize("bad", BAD_LINES)
@pytest.mark.parametrize("nested", [False, True], ids=["in the file", "in an included file"])
def test_a_bad_line_is_named_with_its_file(bad, nested, tmp_path):
    (tmp_path / "bad.gin").write_text(f"SEED = 1\n{bad}\n")
    (tmp_path / "outer.gin").write_text("include 'bad.gin'\n")
    name = "outer.gin" if nested else "bad.gin"
    with pytest.raises(errors.RestError) as raised:
        gin_setup.load_experiment([TINY, name], TINY_BINDINGS, gin_search_paths=[str(tmp_path)])
    line = str(raised.value)
    assert BAD_LINES[bad] in line
    assert "bad.gin" in line
    assert "\n" not in line


def test_a_file_that_includes_itself_is_refused(tmp_path):
    (tmp_path / "circle.gin").write_text("include 'circle.gin'\n")
    with pytest.raises(errors.ConfigError, match="circle.gin"):
        gin_setup.load_experiment([TINY, "circle.gin"], TINY_BINDINGS, gin_search_paths=[str(tmp_path)])


def test_a_file_that_is_no_text_is_named(tmp_path):
    (tmp_path / "binary.gin").write_bytes(b"\xff\xfe\x00SEED")
    with pytest.raises(errors.ConfigError, match="binary.gin"):
        gin_setup.load_experiment([TINY, "binary.gin"], TINY_BINDINGS, gin_search_paths=[str(tmp_path)])
