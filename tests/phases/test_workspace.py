from __future__ import annotations

import pytest

from rest_jax import errors, files
from rest_jax.phases.workspace import check_vocabulary_fits, read_ledger
from tests.phases import places


class Work:
    """Writes a file, and counts how often it was asked to."""

    def __init__(self, folder):
        self.folder, self.times = folder, 0

    def __call__(self):
        self.times += 1
        if not (self.folder / "a.txt").exists():
            files.write_text(self.folder / "a.txt", "alpha")
        files.write_text(self.folder / "log" / "scratch.txt", f"time {self.times}")
        return {"answer": 42}


@pytest.fixture
def place(tmp_path):
    return places.workspace(tmp_path)


def run(place, work, identity=None, **options):
    return place.run_step(work.folder, "grow", identity or {"x": 1}, work, scratch=("log",), **options)


def test_a_step_is_done_once_and_entered_once(place):
    work = Work(place.run_dir / "part")
    first, second = run(place, work), run(place, work)
    assert work.times == 1
    assert first == second
    (entry,) = read_ledger(place.run_dir)
    assert (entry["step"], entry["phase"], entry["digest"]) == ("part", "grow", first.digest)
    assert entry["facts"]["answer"] == 42
    assert set(entry["facts"]["versions"]) == {"rest_jax", "jax", "device"}
    assert set(first.files) == {"a.txt"}


def test_a_step_of_other_settings_or_seed_is_refused(place, tmp_path):
    work = Work(place.run_dir / "part")
    run(place, work)
    with pytest.raises(errors.ConfigError, match="part was made with .* differing: x"):
        run(place, work, {"x": 2})
    with pytest.raises(errors.ConfigError, match="differing: seed"):
        run(places.workspace(tmp_path, "SEED=1"), work)
    assert work.times == 1


def test_a_step_that_failed_is_done_again_and_is_not_in_the_ledger(place):
    work = Work(place.run_dir / "part")

    def fail():
        work()
        raise RuntimeError("midway")

    with pytest.raises(RuntimeError, match="midway"):
        place.run_step(work.folder, "grow", {"x": 1}, fail, scratch=("log",))
    assert read_ledger(place.run_dir) == []
    run(place, work)
    assert work.times == 2
    assert len(read_ledger(place.run_dir)) == 1


def test_a_seal_without_its_line_in_the_ledger_gets_one(place):
    """Killed after the seal and before the ledger."""
    work = Work(place.run_dir / "part")
    run(place, work)
    (place.run_dir / "ledger.jsonl").unlink()
    run(place, work)
    assert work.times == 1
    assert [entry["step"] for entry in read_ledger(place.run_dir)] == ["part"]


def test_damage_is_an_error_or_is_mended(place):
    work = Work(place.run_dir / "part")
    digest = run(place, work).digest
    (work.folder / "a.txt").write_text("alphb")
    with pytest.raises(errors.IntegrityError, match="a.txt has other bytes"):
        run(place, work)
    (work.folder / "a.txt").unlink()  # what a step that repairs itself does with what it finds damaged
    assert run(place, work, repairs_itself=True).digest == digest
    assert work.times == 2


def test_an_input_that_is_missing_is_named_with_the_verb_that_makes_it(place):
    with pytest.raises(
        errors.MissingInputError, match="data is missing or unfinished.*`rest-jax vocab` first"
    ):
        place.split("train")


def test_a_split_that_the_corpus_lacks_is_named(place):
    places.put_text(place, train=places.made_up(2))
    with pytest.raises(errors.MissingInputError, match="the corpus has no 'rater' split"):
        place.split("rater")
    assert len(place.split("train")) == 2


def test_a_vocabulary_must_fit_the_network():
    check_vocabulary_fits(100, 100)
    with pytest.raises(errors.ConfigError, match="101 pieces .* 100 rows .*at least 101"):
        check_vocabulary_fits(101, 100)


def based(tmp_path, base, *bindings):
    """A second run that may take steps over from the first."""
    return places.workspace(tmp_path / "second", f'BASE_RUN="{base.run_dir}"', *bindings)


def test_a_step_of_the_same_things_is_taken_over_from_the_base_run(place, tmp_path):
    first = run(place, Work(place.run_dir / "part"))
    other = based(tmp_path, place)
    work = Work(other.run_dir / "part")
    assert run(other, work) == first
    assert work.times == 0
    assert (work.folder / "a.txt").read_text(encoding="utf-8") == "alpha"
    assert not (work.folder / "log").exists()  # scratch is no part of it
    assert [entry["step"] for entry in read_ledger(other.run_dir)] == ["part"]
    # The base may go: the second run has all that it took.
    files.clear_folder(place.run_dir)
    files.verify_seal(work.folder)


def test_a_step_of_other_things_is_done_anew_beside_a_base_run(place, tmp_path):
    run(place, Work(place.run_dir / "part"))
    for n, (identity, bindings) in enumerate([({"x": 2}, ()), ({"x": 1}, ("SEED=5",))]):
        other = based(tmp_path / str(n), place, *bindings)
        work = Work(other.run_dir / "part")
        run(other, work, identity)
        assert work.times == 1


def test_work_that_has_begun_is_not_replaced_by_the_base_run(place, tmp_path):
    run(place, Work(place.run_dir / "part"))
    other = based(tmp_path, place)
    work = Work(other.run_dir / "part")
    files.claim(work.folder, other.identity("grow", {"x": 1}))
    run(other, work)
    assert work.times == 1


def test_a_damaged_base_run_is_named(place, tmp_path):
    run(place, Work(place.run_dir / "part"))
    (place.run_dir / "part" / "a.txt").write_text("beta", encoding="utf-8")
    other = based(tmp_path, place)
    with pytest.raises(errors.IntegrityError, match=r"run/part/a\.txt has other bytes"):
        run(other, Work(other.run_dir / "part"))


def test_a_base_run_that_is_not_there_is_named(tmp_path):
    with pytest.raises(errors.ConfigError, match="no run folder nowhere"):
        places.workspace(tmp_path, 'BASE_RUN="nowhere"')
