"""What the documentation says to type works: every command is checked, every Python block is run.

The demo takes minutes, so the finished tiny run stands in its place, `runs/demo`. What a command does is
tested elsewhere; here it is enough that the program takes it with all its settings.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from rest_jax import errors, gin_setup, main
from tests import tiny

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    path
    for path in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "launch").glob("*.md"))
    if not any(part.startswith(".") for part in path.relative_to(ROOT).parts)
)
SHELL = ("sh", "bash", "console", "shell")
PROGRAM = ("rest-jax", "python -m rest_jax.main")
# What a reader writes or is given by others, and is not in the tree.
READERS_OWN = re.compile(r"^(my_|runs/|~|/)")
# Tools that a reader has, and that the pages use as everyone does.
TOOLS = {
    "cat",
    "cd",
    "cp",
    "rm",
    "mkdir",
    "git",
    "pip",
    "python3",
    "head",
    "tail",
    "wc",
    "less",
    "zcat",
    "ls",
    "ssh",
}


class Block(NamedTuple):
    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(path: Path) -> Iterator[Block]:
    """The fenced blocks of a page, however deep they are indented."""
    language, start, indent, lines = None, 0, "", []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        fence = re.match(r"^(\s*)```(\w*)", line)
        if fence and language is None:
            indent, language, start, lines = fence[1], fence[2], number, []
        elif fence:
            assert language is not None
            yield Block(path.relative_to(ROOT).as_posix(), start, language, "\n".join(lines) + "\n")
            language = None
        elif language is not None:
            lines.append(line.removeprefix(indent))
    assert language is None, f"{path}:{start} is never closed"


BLOCKS = [block for path in PAGES for block in blocks_of(path)]


def commands_of(block: Block) -> Iterator[list[str]]:
    """The commands of a shell block as words: continued lines joined, pipes cut, variables put in."""
    variables: dict[str, str] = {}
    text = block.text
    if block.language == "console":  # only what stands behind a prompt was typed
        text = "\n".join(line[2:] for line in text.splitlines() if line.startswith("$ "))
    for line in text.replace("\\\n", " ").splitlines():
        words = []
        for word in shlex.split(line, comments=True):
            # As the shell does: a value is split at spaces, and quotes in it stay.
            words += variables[word[1:]].split() if word[1:] in variables and word[0] == "$" else [word]
        if len(words) == 1 and (match := re.fullmatch(r"([a-zA-Z_]\w*)=(.*)", words[0])):
            variables[match[1]] = match[2]
            continue
        command: list[str] = []
        for word in [*words, ";"]:
            if word in ("|", "&&", ";", "||"):
                if command:
                    yield command
                command = []
            else:
                command.append(word)


COMMANDS = [
    pytest.param(block, words, id=f"{block} {' '.join(words)[:50]}")
    for block in BLOCKS
    if block.language in SHELL
    for words in commands_of(block)
]


def without_environment(words: list[str]) -> list[str]:
    """A command without the settings of the environment before it."""
    while words and re.fullmatch(r"[A-Z_][A-Z0-9_]*=.*", words[0]):
        words = words[1:]
    return words


def program_arguments(words: list[str]) -> list[str] | None:
    """What is given to our program, or None where another is run."""
    name = Path(words[0]).name
    if name == "rest-jax":
        return words[1:]
    if re.fullmatch(r"python3?", name) and words[1:3] == ["-m", "rest_jax.main"]:
        return words[3:]
    return None


def check_program(arguments: list[str]) -> None:
    """The parser takes it, the gin files are there, and the settings build an experiment."""
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            parsed = main.parse(arguments)
        except SystemExit as end:
            assert end.code == 0 and "--help" in arguments, f"the program refuses {arguments}"
            return
    if not parsed.gin_file:
        assert parsed.verb in ("compare", "doctor", "report", "inspect", "verify"), (
            "this verb needs a gin file"
        )
        return
    if any(READERS_OWN.match(name) for name in parsed.gin_file):
        return
    gin_setup.load_experiment(parsed.gin_file, parsed.bindings, parsed.gin_search_paths)


def check_make(words: list[str]) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = [word for word in words[1:] if "=" not in word and not word.startswith("-")]
    assert set(named) <= targets


def check_launch(words: list[str]) -> None:
    """The script prints what it would do; the program's part of it is checked too."""
    script = ROOT / words[0].removeprefix("./")
    assert os.access(script, os.X_OK)
    if "--help" not in words and "--dry-run" not in words:
        verb = words[1:2] if script.name == "tpu_vm.sh" else []
        words = [words[0], *verb, "--dry-run", *words[1 + len(verb) :]]
    done = subprocess.run(
        [script, *words[1:]], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    verbs = [k for k, word in enumerate(words) if word in main.VERBS]
    if verbs and script.name != "tpu_vm.sh":
        with contextlib.suppress(errors.ConfigError):  # what the script itself adds may be missing here
            check_program(words[verbs[0] :])


def test_there_are_pages_with_commands():
    assert {"README.md", "docs/tutorial.md"} <= {path.relative_to(ROOT).as_posix() for path in PAGES}
    assert len(COMMANDS) > 10


@pytest.mark.parametrize("block,words", COMMANDS)
def test_a_command_can_be_typed(block, words):
    words = without_environment(words)
    arguments = program_arguments(words)
    if arguments is not None:
        check_program(arguments)
    elif words[0] == "make":
        check_make(words)
    elif words[0].removeprefix("./").startswith("launch/"):
        check_launch(words)
    elif words[0].endswith(("/python", "/pytest", "/ruff", "/mypy")) or words[0] in ("python", "pytest"):
        for word in words[1:]:
            if re.fullmatch(r"(tests|docs|gin_configs|rest_jax|benchmarks)/[\w./-]+", word):
                assert (ROOT / word.split("::")[0]).exists(), f"{block} names {word}"
    else:
        assert words[0] in TOOLS or words[0] in ("echo", "printf"), f"{block}: what is {words[0]}?"


# Python.


def python_by_page() -> list[list[Block]]:
    pages: dict[str, list[Block]] = {}
    for block in BLOCKS:
        if block.language == "python":
            pages.setdefault(block.page, []).append(block)
    return list(pages.values())


@pytest.fixture
def reader(finished_run, tmp_path, monkeypatch) -> Path:
    """A working folder as a reader has it: the finished run in the demo's place, and files of one's own."""
    (tmp_path / "runs").mkdir()
    shutil.copytree(finished_run, tmp_path / "runs" / "demo")
    (tmp_path / "mqm.tsv").write_text("one red cat\tein rot Katze\t-1.0\ntwo\tdrei\t-25.0\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("blocks", python_by_page(), ids=lambda blocks: blocks[0].page)
def test_the_python_of_a_page_runs(blocks, reader, finished_run):
    """The blocks of a page are run one after another, in one session."""
    session: dict[str, object] = {"__name__": "reader"}
    for block in blocks:
        code = compile(block.text, str(block), "exec")
        absent = [name for name in top_imports(block.text) if importlib.util.find_spec(name) is None]
        if absent:
            pytest.skip(f"{', '.join(absent)} is not installed")
        if "exported" in block.text:
            export(reader, finished_run)
        with contextlib.redirect_stdout(io.StringIO()):
            exec(code, session)  # noqa: S102 (the page says to type it)


def top_imports(text: str) -> set[str]:
    return {m[1] for m in re.finditer(r"^(?:import|from) (\w+)", text, re.MULTILINE)}


def export(reader: Path, finished_run: Path) -> None:
    corpus = finished_run.parent / "pairs.tsv"
    done = tiny.tiny("export", reader / "runs" / "demo", corpus, f"--output={reader / 'exported'}")
    assert done.returncode == 0, done.stderr


# Links and names.


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_and_named_files_exist(path):
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        if not re.match(r"^[a-z]+:", target):
            assert (path.parent / target).exists(), f"{path.name} links to {target}"
    for name in re.findall(r"`((?:rest_jax|gin_configs|launch|tests|docs|benchmarks)/[\w./-]+)`", text):
        assert (ROOT / name.split("::")[0]).exists(), f"{path.name} names {name}"


def test_exit_codes_in_the_pages_are_those_of_the_program():
    codes = {kind.__name__: kind.exit_code for kind in errors.RestError.__subclasses__()}
    table = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    for name, code in codes.items():
        assert re.search(rf"^\| {code} \|.*`{name}`", table, re.MULTILINE), f"{name} ({code})"


@pytest.mark.parametrize("arguments", [("doctor",), ("rest", "--help")], ids=" ".join)
def test_cheap_commands_run(arguments):
    done = tiny.program(*arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
