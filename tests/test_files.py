from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from rest_jax import errors, files

ROOT = Path(__file__).resolve().parents[1]


def python(code: str, *arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs code that knows `files` in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", "import sys\nfrom rest_jax import files\n" + code, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def made(folder: Path) -> Path:
    """A folder with two files and one below."""
    files.write_text(folder / "a.txt", "alpha")
    files.write_text(folder / "deep" / "b.txt", "beta")
    files.write_text(folder / "scratch" / "log.txt", "not part of it")
    return folder


# Atomic writes.


def test_a_written_file_is_whole_readable_and_alone(tmp_path):
    files.write_text(tmp_path / "new" / "a.txt", "né\n")
    path = tmp_path / "new" / "a.txt"
    assert path.read_bytes() == "né\n".encode()
    assert path.stat().st_mode & 0o777 == 0o644
    assert [p.name for p in path.parent.iterdir()] == ["a.txt"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.txt"
    files.write_text(path, "old")
    with pytest.raises(RuntimeError, match="midway"), files.atomic_path(path) as temporary:
        temporary.write_text("half of the ne")
        raise RuntimeError("midway")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_kill_before_the_rename_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    files.write_text(path, "old")
    done = python("files.write_text(sys.argv[1], 'new')", path, REST_JAX_FAILPOINT="before-rename:a.txt")
    assert done.returncode == -signal.SIGKILL
    assert path.read_text() == "old"


def test_a_folder_that_cannot_be_written_is_an_error_with_a_remedy(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(errors.OutputError, match="cannot write .*file/a.txt: .*Free space") as raised:
        files.write_text(tmp_path / "file" / "a.txt", "x")
    assert raised.value.exit_code == 74


def test_a_failpoint_of_another_name_does_nothing(monkeypatch):
    monkeypatch.setenv("REST_JAX_FAILPOINT", "elsewhere")
    files.failpoint("here")


# JSON and digests.


@dataclasses.dataclass(frozen=True)
class Point:
    x: float
    name: str = "p"


def test_equal_values_have_equal_digests_and_others_do_not():
    value = {"b": [1, 2.5, None], "a": Point(0.5), "path": Path("x/y"), "n": np.int64(3)}
    again = {"n": 3, "path": "x/y", "a": Point(0.5), "b": (1, 2.5, None)}
    assert files.digest_of(value) == files.digest_of(again)
    for other in ({**value, "n": 4}, {**value, "a": Point(0.25)}, {**value, "extra": 0}):
        assert files.digest_of(other) != files.digest_of(value)


def test_dataclasses_of_different_classes_differ():
    other = dataclasses.make_dataclass("Other", [("x", float), ("name", str, "p")], frozen=True)
    assert files.digest_of(Point(1.0)) != files.digest_of(other(1.0))


def test_what_is_not_json_is_refused(tmp_path):
    with pytest.raises(TypeError, match="cannot write set"):
        files.canonical_json({"a": {1, 2}})
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert not list(tmp_path.iterdir())


def test_json_comes_back(tmp_path):
    value = {"ä": [1, 2.5, None, True], "b": {"c": "d"}}
    files.write_json(tmp_path / "a.json", value)
    assert files.read_json(tmp_path / "a.json") == value


def test_a_missing_and_a_torn_json_file_are_named(tmp_path):
    with pytest.raises(errors.MissingInputError, match="no file .*a.json"):
        files.read_json(tmp_path / "a.json")
    (tmp_path / "a.json").write_text('{"half": ')
    with pytest.raises(errors.IntegrityError, match="a.json is not JSON"):
        files.read_json(tmp_path / "a.json")


# Seals.


def test_a_seal_names_every_file_but_scratch(tmp_path):
    folder = made(tmp_path / "out")
    assert files.read_seal(folder) is None
    seal = files.write_seal(folder, "grow", "identity", {"samples": 4}, skip=("scratch",))
    assert set(seal.files) == {"a.txt", "deep/b.txt"}
    assert files.verify_seal(folder) == seal == files.read_seal(folder)
    assert seal.facts == {"samples": 4}


def test_the_digest_of_a_seal_is_of_identity_and_bytes_not_of_facts(tmp_path):
    first = files.write_seal(made(tmp_path / "one"), "grow", "identity", {"seconds": 1.0})
    second = files.write_seal(made(tmp_path / "two"), "grow", "identity", {"seconds": 2.0})
    other_identity = files.write_seal(made(tmp_path / "three"), "grow", "another")
    files.write_text(made(tmp_path / "four") / "a.txt", "alphb")
    other_bytes = files.write_seal(tmp_path / "four", "grow", "identity")
    assert first.digest == second.digest
    assert len({first.digest, other_identity.digest, other_bytes.digest}) == 3


def test_a_sealed_folder_can_be_moved(tmp_path):
    files.write_seal(made(tmp_path / "out"), "grow", "identity")
    (tmp_path / "out").rename(tmp_path / "elsewhere")
    files.verify_seal(tmp_path / "elsewhere")


@pytest.mark.parametrize("name", ["a.txt", "deep/b.txt"])
def test_one_flipped_bit_is_found_and_named(tmp_path, name):
    folder = made(tmp_path / "out")
    files.write_seal(folder, "pretrain", "identity")
    content = bytearray((folder / name).read_bytes())
    content[-1] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(
        errors.IntegrityError, match=f"{re.escape(name)} has other bytes.*run the pretrain phase again"
    ):
        files.verify_seal(folder)


def test_a_missing_file_and_a_missing_seal_are_found_and_named(tmp_path):
    folder = made(tmp_path / "out")
    with pytest.raises(errors.MissingInputError, match="out is not finished"):
        files.verify_seal(folder)
    files.write_seal(folder, "pretrain", "identity")
    (folder / "deep" / "b.txt").unlink()
    with pytest.raises(errors.IntegrityError, match="deep/b.txt is missing"):
        files.verify_seal(folder)


@pytest.mark.parametrize("point,sealed", [("before-seal:grow", False), ("after-seal:grow", True)])
def test_the_seal_is_the_commit(tmp_path, point, sealed):
    folder = made(tmp_path / "out")
    done = python("files.write_seal(sys.argv[1], 'grow', 'identity')", folder, REST_JAX_FAILPOINT=point)
    assert done.returncode == -signal.SIGKILL
    assert (files.read_seal(folder) is not None) is sealed


def test_a_leftover_of_a_killed_write_is_not_sealed(tmp_path):
    folder = made(tmp_path / "out")
    python("files.write_text(sys.argv[1], 'x')", folder / "a.txt", REST_JAX_FAILPOINT="before-rename:a.txt")
    assert len(list(folder.glob(".a.txt.*.tmp"))) == 1
    assert set(files.write_seal(folder, "grow", "identity").files) == {
        "a.txt", "deep/b.txt", "scratch/log.txt",
    }  # fmt: skip


# Claims.


IDENTITY = {"seed": 1, "trainer": {"steps": 10, "optimizer": {"rate": 0.1}}, "data": "abc"}


def test_a_claim_is_found_again_and_has_the_same_digest(tmp_path):
    digest = files.claim(tmp_path / "out", IDENTITY)
    assert files.claim(tmp_path / "out", dict(reversed(IDENTITY.items()))) == digest
    assert json.loads((tmp_path / "out" / files.IDENTITY_NAME).read_text()) == IDENTITY


def test_a_claim_refuses_another_identity_and_lists_what_differs(tmp_path):
    files.claim(tmp_path / "out", IDENTITY)
    other = {"seed": 2, "trainer": {"steps": 10, "optimizer": {"rate": 0.2}}, "extra": None}
    with pytest.raises(
        errors.ConfigError, match="differing: data, extra, seed, trainer.optimizer.rate. .*new MODEL_DIR"
    ):
        files.claim(tmp_path / "out", other)
    assert files.claim(tmp_path / "out", IDENTITY) == files.digest_of(IDENTITY)


def test_a_long_list_of_differences_is_cut(tmp_path):
    files.claim(tmp_path / "out", {f"key{k}": 0 for k in range(9)})
    with pytest.raises(errors.ConfigError, match=r"key0, key1, key2, key3, key4, key5 …"):
        files.claim(tmp_path / "out", {f"key{k}": 1 for k in range(9)})


def test_a_cleared_folder_is_gone_and_may_be_missing(tmp_path):
    files.clear_folder(made(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    files.clear_folder(tmp_path / "out")


# The lock.


def test_a_second_process_is_refused_and_told_who_holds_the_lock(tmp_path):
    code = """
from rest_jax import errors
try:
    with files.run_lock(sys.argv[1]):
        print("taken")
except errors.LockedError as error:
    print(error.exit_code, error)
"""
    with files.run_lock(tmp_path / "run"):
        refused = python(code, tmp_path / "run").stdout
    assert refused.startswith("75 ")
    assert f"in use by another run (pid {os.getpid()} on " in refused
    assert "Wait for it" in refused
    assert python(code, tmp_path / "run").stdout == "taken\n"


def test_the_lock_ends_with_a_killed_process(tmp_path):
    code = "import os\nwith files.run_lock(sys.argv[1]):\n    os.kill(os.getpid(), 9)"
    assert python(code, tmp_path).returncode == -signal.SIGKILL
    with files.run_lock(tmp_path):
        assert f"pid {os.getpid()} " in (tmp_path / ".lock").read_text()


TRY = """
from rest_jax import errors
job = (int(sys.argv[2]), int(sys.argv[3])) if len(sys.argv) > 2 else None
try:
    with files.run_lock(sys.argv[1], job):
        print("taken")
except errors.LockedError as error:
    print(error.exit_code, error)
"""


def tries(run_dir: Path, *job: int) -> str:
    """What another process says that tries to take a run folder, whole or as a job."""
    return python(TRY, run_dir, *map(str, job)).stdout


def test_jobs_of_one_division_share_a_run_and_exclude_all_else(tmp_path):
    with files.run_lock(tmp_path, (1, 3)):
        assert tries(tmp_path, 2, 3) == "taken\n"
        for other in ((1, 3), (2, 4), (1, 2), ()):
            said = tries(tmp_path, *other)
            assert said.startswith("75 "), other
            assert f"in use by another run (job 1 of 3, pid {os.getpid()} on " in said
        with files.run_lock(tmp_path, (3, 3)):
            assert "job 1 of 3" in tries(tmp_path) and "job 3 of 3" in tries(tmp_path)
    for later in ((1, 3), (2, 4), ()):
        assert tries(tmp_path, *later) == "taken\n"


def test_a_whole_run_excludes_jobs(tmp_path):
    with files.run_lock(tmp_path):
        assert f"in use by another run (pid {os.getpid()} on " in tries(tmp_path, 1, 3)
    assert tries(tmp_path, 1, 3) == "taken\n"


def test_the_lock_of_a_job_ends_with_it(tmp_path):
    code = "import os\nwith files.run_lock(sys.argv[1], (1, 2)):\n    os.kill(os.getpid(), 9)"
    assert python(code, tmp_path).returncode == -signal.SIGKILL
    assert (tmp_path / ".lock.job-1-of-2").read_text().startswith("job 1 of 2, pid ")
    assert tries(tmp_path) == "taken\n"
    assert tries(tmp_path, 1, 2) == "taken\n"


def test_processes_that_claim_one_folder_at_once_take_turns(tmp_path):
    """Each adds one to a number that it read before; without turns some of them would be lost."""
    (tmp_path / "count").write_text("0")
    code = """
for _ in range(50):
    with files.turn(sys.argv[1]):
        path = sys.argv[1] + "/count"
        number = int(open(path).read())
        open(path, "w").write(str(number + 1))
"""
    script = "import sys\nfrom rest_jax import files\n" + code
    started = [subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], cwd=ROOT) for _ in range(3)]
    assert [process.wait(timeout=120) for process in started] == [0, 0, 0]
    assert (tmp_path / "count").read_text() == "150"


def test_a_mark_is_compared_without_writing(tmp_path):
    with pytest.raises(errors.MissingInputError, match="IDENTITY.json"):
        files.check_claim(tmp_path, {"a": 1})
    assert list(tmp_path.iterdir()) == []
    digest = files.claim(tmp_path, {"a": 1})
    assert files.check_claim(tmp_path, {"a": 1}) == digest
    with pytest.raises(errors.ConfigError, match="differing: a"):
        files.check_claim(tmp_path, {"a": 2})


def test_a_run_folder_that_cannot_be_made_is_an_output_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(errors.OutputError, match="file/run"), files.run_lock(tmp_path / "file" / "run"):
        pass


# Errors.


def test_an_error_is_one_line_that_names_thing_place_and_remedy():
    error = errors.DataError("0 usable\nrows.", where="a.tsv:3", remedy="Give some")
    assert str(error) == "0 usable rows. [a.tsv:3]. Give some"
    assert str(errors.DataError("no rows.", remedy="Give some")) == "no rows. Give some"


def test_each_kind_of_error_has_its_own_exit_code():
    kinds = errors.RestError.__subclasses__()
    codes = [kind.exit_code for kind in kinds]
    assert len(kinds) >= 7
    assert len(set(codes)) == len(codes)
    assert all(64 <= code <= 78 for code in codes)
