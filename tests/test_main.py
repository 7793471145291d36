"""The program as a user meets it: exit codes, one line an error, help, and the verbs of a finished run."""

from __future__ import annotations

import re

import pytest

from rest_jax import main
from tests import tiny

DEMO = "gin_configs/runs/rest_demo_zh_en.gin"
RUN_VERBS = [
    "vocab", "pretrain", "reward_model", "grow", "annotate", "improve", "evaluate", "rest", "translate",
]  # fmt: skip


@pytest.fixture
def corpus(tmp_path):
    return tiny.write_corpus(tmp_path / "pairs.tsv", 30)


def run_here(capsys, *arguments: str) -> tuple[int, str, str]:
    """Runs the program in this process: exit code, standard output, standard error."""
    try:
        code = main.main(arguments)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    said = capsys.readouterr()
    return code, said.out, said.err


def refused(capsys, code: int, *arguments: str) -> str:
    """The one line that a run ends with; nothing else may be said before any work."""
    found, out, err = run_here(capsys, *arguments)
    assert found == code, err
    lines = err.strip().splitlines()
    assert out == "" and len(lines) == 1, err
    assert re.match(rf"rest_jax: E{code} {arguments[0]}: ", lines[0])
    return lines[0]


def tiny_arguments(tmp_path, corpus, *more: str) -> list[str]:
    return [f"--gin_file={tiny.GIN_FILE}", *tiny.bindings(tmp_path / "run", corpus), *more]


# Before any work. The first five are what a user gets wrong first.

SETTINGS = {
    "no such key": ("--gin.NO_SUCH_KEY=1", "no part of the program reads NO_SUCH_KEY"),
    "misspelt class": ("--gin.T5Confg.emb_dim=8", "Did you mean T5Config?"),
    "falling thresholds": ("--gin.ThresholdSchedule.quantiles=(0.8, 0.6)", "threshold list falls"),
    "text without quotes": ("--gin.MODEL_DIR=run", "Text needs quotes of its own"),
    "too many steps": ("--gin.GROW_STEPS=-1", "grow_steps is -1"),
}  # fmt: skip


@pytest.mark.parametrize("verb", ["rest", "translate"])
@pytest.mark.parametrize("mistake", SETTINGS)
def test_a_wrong_setting_stops_every_verb_before_any_work(capsys, tmp_path, corpus, verb, mistake):
    binding, said = SETTINGS[mistake]
    assert said in refused(capsys, 78, verb, *tiny_arguments(tmp_path, corpus, binding))
    assert not (tmp_path / "run").exists()


def test_a_misspelt_gin_file_is_named_with_the_one_that_was_meant(capsys):
    line = refused(capsys, 66, "rest", "--gin_file=gin_configs/runs/rest_demo_zh_em.gin")
    assert f"Did you mean {DEMO}?" in line


def test_a_random_number_generator_that_is_not_addressable_is_refused(tmp_path, corpus):
    done = tiny.tiny("vocab", tmp_path / "run", corpus, env={"JAX_DEFAULT_PRNG_IMPL": "rbg"})
    assert done.returncode == 78
    assert "Unset JAX_DEFAULT_PRNG_IMPL" in done.stderr.strip().splitlines()[-1]


GOOD = "ein Satz\ta sentence\n"
CORPORA = {
    "missing": (None, 66, "pairs.tsv"),
    "empty": (b"", 65, "0 usable rows"),
    "blank lines only": (b"\n\n\n", 65, "pairs.tsv"),
    "a row with one column": ((GOOD * 3 + "only one\n").encode(), 65, "pairs.tsv:4"),
    "not UTF-8": (GOOD.encode() + b"\xff\xfe\ta\n", 65, "pairs.tsv:2"),
    "too few rows": (GOOD.encode(), 65, "rows"),
}


@pytest.mark.parametrize("state", CORPORA)
def test_a_corpus_that_is_missing_or_wrong_stops_the_run(capsys, tmp_path, state):
    content, code, said = CORPORA[state]
    path = tmp_path / "pairs.tsv"
    if content is not None:
        path.write_bytes(content)
    found, _, err = run_here(capsys, "rest", *tiny_arguments(tmp_path, path))
    assert found == code, err
    line = err.strip().splitlines()[-1]
    assert re.match(rf"rest_jax: E{code} rest: ", line) and said in line
    assert "Traceback" not in err
    assert not list((tmp_path / "run").rglob("SEAL.json"))


def test_a_mistake_in_the_corpus_is_one_line_in_a_process_of_its_own(tmp_path):
    """What libraries print when they start would show here."""
    (tmp_path / "pairs.tsv").write_text("only one column\n")
    done = tiny.tiny("vocab", tmp_path / "run", tmp_path / "pairs.tsv")
    assert (done.returncode, done.stdout) == (65, "")
    (line,) = done.stderr.splitlines()
    assert "pairs.tsv:1" in line


@pytest.mark.parametrize(
    "verb,more,needed",
    [
        ("pretrain", [], "vocab"),
        ("reward_model", [], "pretrain"),
        ("grow", ["--grow_step=1"], "pretrain"),
        ("grow", ["--grow_step=2"], "improve"),
        ("annotate", ["--grow_step=1"], "reward_model"),
        ("improve", ["--grow_step=1", "--improve_step=1"], "pretrain"),
        ("improve", ["--grow_step=1", "--improve_step=2"], "improve"),
        ("evaluate", ["--policy=bc"], "pretrain"),
        ("evaluate", ["--policy=g1_i1"], "improve"),
        ("translate", [], "pretrain"),
    ],
)
def test_a_verb_whose_input_is_missing_names_the_verb_that_makes_it(
    capsys, tmp_path, corpus, verb, more, needed
):
    line = refused(capsys, 66, verb, *tiny_arguments(tmp_path, corpus), *more)
    assert f"`rest-jax {needed}` first" in line


@pytest.mark.parametrize(
    "verb,more,said",
    [
        ("improve", ["--grow_step=3"], "no Improve step g3_i1: G = 2, I = 2"),
        ("improve", ["--improve_step=0"], "no Improve step g1_i0"),
        ("evaluate", ["--policy=best"], "no policy is called 'best'"),
        ("evaluate", ["--policy=g0_i1"], "no policy is called 'g0_i1'"),
        ("grow", ["--grow_step=3"], "no Grow step 3: G = 2"),
        ("grow", ["--grow_step=0"], "no Grow step 0"),
        ("annotate", ["--grow_step=0"], "no Grow step 0"),
    ],
)
def test_a_step_that_the_run_does_not_have_is_refused(capsys, tmp_path, corpus, verb, more, said):
    assert said in refused(capsys, 78, verb, *tiny_arguments(tmp_path, corpus), *more)


def test_a_report_of_nothing_is_refused(capsys, tmp_path):
    line = refused(capsys, 66, "report", str(tmp_path / "none"))
    assert "no run folder" in line and "MODEL_DIR" in line


def test_a_run_in_use_is_refused(capsys, tmp_path, corpus):
    from rest_jax import files

    with files.run_lock(tmp_path / "run"):
        line = refused(capsys, 75, "vocab", *tiny_arguments(tmp_path, corpus))
    assert "in use by another run (pid " in line


def test_a_folder_that_cannot_be_made_is_refused(capsys, tmp_path, corpus):
    (tmp_path / "run").write_text("in the way")
    assert "cannot write" in refused(capsys, 74, "vocab", *tiny_arguments(tmp_path, corpus))


def test_a_bug_says_so_with_a_traceback(capsys, monkeypatch):
    def broken(arguments):
        raise ZeroDivisionError("of all things")

    monkeypatch.setitem(main.VERBS, "doctor", main.VERBS["doctor"]._replace(run=broken))
    code, _, err = run_here(capsys, "doctor")
    assert code == 70
    assert "Traceback" in err
    assert err.strip().splitlines()[-1] == "rest_jax: E70 doctor: ZeroDivisionError: of all things"


# Help.


def test_help_lists_every_verb_with_what_it_does(capsys):
    code, out, _ = run_here(capsys, "--help")
    assert code == 0
    for name, verb in main.VERBS.items():
        assert re.search(rf"^\s+{name}\s+{re.escape(verb.does.split()[0])}", out, re.MULTILINE)


@pytest.mark.parametrize("verb", main.VERBS)
def test_help_of_a_verb_says_what_it_reads_and_writes(capsys, verb):
    code, out, err = run_here(capsys, verb, "--help")
    assert (code, err) == (0, "")
    assert main.VERBS[verb].does in out
    assert re.search(r"^reads: +\S", out, re.MULTILINE) and re.search(r"^writes: +\S", out, re.MULTILINE)
    assert "--gin_file=F" in out and "--gin.KEY=value" in out


def test_the_verbs_are_those_that_are_promised():
    assert set(main.VERBS) >= {*RUN_VERBS, "report", "doctor", "export", "import", "inspect", "verify"}


@pytest.mark.parametrize(
    "arguments", [["nonsense"], [], ["rest", "--no_such_flag"], ["grow", "--grow_step=x"], ["rest", "extra"]]
)
def test_a_wrong_command_line_exits_with_2(capsys, arguments):
    code, out, err = run_here(capsys, *arguments)
    assert (code, out) == (2, "")
    assert "usage: rest-jax" in err


def test_flags_may_not_be_shortened():
    with pytest.raises(SystemExit):
        main.parse(["rest", "--gin_fil=x"])


def test_bindings_and_files_are_collected_in_order():
    parsed = main.parse(
        ["rest", "--gin_file=a", "--gin.SEED=1", "--gin_file=b", '--gin.X="y=z"', "--gin_search_paths=p,q"]
    )
    assert parsed.gin_file == ["a", "b"]
    assert parsed.bindings == ["SEED=1", 'X="y=z"']
    assert parsed.gin_search_paths == ["p", "q"]


# On a finished run.


@pytest.fixture
def finished(finished_run):
    """Arguments that name the finished run."""
    corpus = finished_run.parent / "pairs.tsv"
    return [f"--gin_file={tiny.GIN_FILE}", *tiny.bindings(finished_run, corpus)]


LINES = ["one red cat", "", "two blue dog sees bread", "   ", "tree"]


@pytest.mark.parametrize("decoder", ["greedy", "beam", "sample"])
def test_translate_keeps_line_numbers_and_empty_lines(finished, tmp_path, decoder):
    (tmp_path / "in.txt").write_text("\n".join(LINES) + "\n")
    flags = [f"--input={tmp_path / 'in.txt'}", f"--output={tmp_path / 'out.txt'}", f"--decoder={decoder}"]
    done = tiny.program("translate", *finished, *flags)
    assert done.returncode == 0, done.stderr
    found = (tmp_path / "out.txt").read_text().split("\n")
    assert len(found) == len(LINES) + 1 and found[-1] == ""
    assert [bool(line) for line in found[:-1]] == [True, False, True, False, True]


def test_translate_reads_and_writes_a_pipe(finished):
    done = tiny.program("translate", *finished, "--policy=bc", stdin="one red cat\n\ntree")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 3
    assert done.stdout.splitlines()[1] == ""
    alone = tiny.program("translate", *finished, "--policy=bc", stdin="tree\n")
    assert alone.stdout.splitlines() == done.stdout.splitlines()[2:]


def test_translate_without_its_text_says_so(capsys, finished, tmp_path):
    code, _, err = run_here(capsys, "translate", *finished, f"--input={tmp_path / 'none.txt'}")
    assert code == 66
    assert "no file" in err.strip().splitlines()[-1]


def test_the_report_can_be_drawn_again(capsys, copied_run):
    path = copied_run / "report" / "index.html"
    path.unlink()
    code, out, _ = run_here(capsys, "report", str(copied_run))
    assert code == 0 and path.exists()
    assert f"report: {path}" in out.replace("\n", "")
