"""Sweeps: what the file may say, what is run and run again, and the table."""

import json
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ntkbook.publish import cluster, notebooks, runcard, sweep
from ntkbook.publish.parameters import ParameterError

pytestmark = pytest.mark.skipif(find_spec("distributed") is None, reason="the dask extra is not installed")

# A chapter without a figure, which starts faster than the toy book's. It tells in a file that it ran.
TINY = """\
---
kernelspec: {name: python3, display_name: Python 3, language: python}
---

# Tiny

```{code-cell} ipython3
:tags: [parameters]

profile: str = "cpu"
device: str = "cpu"
data_dir: str = ""
seed: int = 0
scale: float = 1.0
names: list[str] = ["a"]
fail: bool = False
wait: bool = False
```

```{code-cell} ipython3
import os
import pathlib
import time

from ntkbook.publish import claims
from ntkbook.publish.verdicts import Claim

with open("log", "a") as log:
    print(seed, os.environ.get("NTKBOOK_DATA"), file=log)
mended = pathlib.Path("mended").exists()
if fail and not mended:
    raise RuntimeError("asked to fail")
while wait and not pathlib.Path("mended").exists():
    time.sleep(0.1)


class Made:
    name, description, is_stand_in = "made", "Made up.", False


claims.CLAIMS = tuple(Claim(key, "03_tiny", "nowhere", "It is large.", "x", ">", 0.0) for key in ("one", "two"))
claims.record("one", scale * seed, scale * seed - 0.5, scale * seed + 0.5, Made(), profile, n=3)
claims.record("two", None, None, None, Made(), profile, n=0, note="nothing there")
```
"""


def make_book(root):
    (root / "book").mkdir(parents=True)
    (root / "profiles").mkdir()
    (root / "book" / "03_tiny.md").write_text(TINY, "utf8")
    (root / "_toc.yml").write_text("root: book/index\nchapters:\n  - file: book/03_tiny.ipynb\n", "utf8")
    (root / "profiles" / "half.yml").write_text("03_tiny: {scale: 0.5}\n", "utf8")
    return root


@pytest.fixture
def book(tmp_path):
    return make_book(tmp_path / "book")


def write(root, text, name="s.yml"):
    (root / name).write_text(text, "utf8")
    return root / name


def log(root):
    """The seeds that ran, in the order of the file."""
    path = root / "book" / "log"
    return [int(line.split()[0]) for line in path.read_text("utf8").splitlines()] if path.exists() else []


def table(root, name="sweep-s"):
    return pq.read_table(root / "runs" / "03_tiny" / name / "results.parquet")


def test_a_grid_is_every_combination_and_jobs_come_after(tmp_path):
    path = write(tmp_path, "grid: {seed: [0, 1], names: [[a], [b, c]]}\njobs: [{seed: 7}, {}]\nbase: {scale: 2.0}\n")
    base, jobs = sweep.read_sweep(path)
    assert base == {"scale": 2.0}
    assert jobs == [
        {"seed": 0, "names": ["a"]}, {"seed": 0, "names": ["b", "c"]},
        {"seed": 1, "names": ["a"]}, {"seed": 1, "names": ["b", "c"]},
        {"seed": 7}, {},
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected grid, jobs or both, .*; got None"),
        ("[1, 2]", r"expected grid, jobs or both, .*; got \[1, 2\]"),
        ("grid: [", "is no YAML"),
        ("base: {seed: 1}", "expected grid, jobs or both"),
        ("seed: [0, 1]", "expected grid, jobs or both"),
        ("grid: {seed: 3}", "grid: expected a list of values for each name"),
        ("grid: {seed: []}", "grid: expected a list"),
        ("grid: [seed]", "grid: expected a list"),
        ("jobs: {seed: 1}", "jobs: expected a list of parameters by name"),
        ("jobs: [3]", "jobs: expected a list"),
        ("jobs: [{1: 2}]", "jobs: expected a list"),
        ("jobs: []", "has no jobs"),
        ("grid: {}", "has no jobs"),
        ("jobs: [{}]\nbase: [1]", "base: expected parameters by name"),
    ],
)
def test_a_file_that_is_no_sweep(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        sweep.read_sweep(write(tmp_path, text))


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("grid: {sede: [0]}", {}, "03_tiny has no parameter 'sede'; did you mean seed"),
        ("jobs: [{seed: 0}, {seed: '1'}]", {}, "'seed' is int, got '1'"),
        ("jobs: [{}]\nbase: {scale: x}", {}, "'scale' is float"),
        ("grid: {seed: [0]}", {"parameters": {"seed": 1}}, "'seed' is given by --params and by a job"),
        ("jobs: [{}]", {"parameters": {"sede": 1}}, "no parameter 'sede'"),
        ("jobs: [{}]", {"profile": "fast"}, "no profile 'fast'"),
        ("jobs: [{data_dir: 3}]", {}, "'data_dir' is str, got 3"),
        ("jobs: [{device: 'cuda:1'}]", {}, "sees one GPU: expected device 'cuda', got 'cuda:1'"),
        ("jobs: [{device: cuda}]", {}, "wants a GPU"),
        ("jobs: [{}]", {"scheduler": "tcp://127.0.0.1:1", "workers": 2}, "a scheduler has its own workers"),
    ],
)
def test_mistakes_are_told_before_anything_runs(book, monkeypatch, text, options, message):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match=message):
        sweep.run_sweep(book, "3", write(book, text), progress=False, **options)
    assert not (book / "runs").exists()


def test_a_login_node_needs_no_gpu(book, monkeypatch):
    """With a scheduler, the device is the workers'."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(cluster, "remote", lambda address: pytest.fail(f"went on to {address}"))
    with pytest.raises(pytest.fail.Exception, match="went on to tcp://x:1"):
        sweep.run_sweep(book, "3", write(book, "jobs: [{device: cuda}]"), scheduler="tcp://x:1")


def test_a_missing_file_names_those_that_are_stored(book):
    (book / "profiles" / "sweeps").mkdir()
    write(book / "profiles" / "sweeps", "jobs: [{seed: '1'}]", "seeds.yml")
    with pytest.raises(FileNotFoundError, match=r"no sweep 'x\.yml'; profiles/sweeps/ has seeds\.yml"):
        sweep.run_sweep(book, "3", "x.yml")
    with pytest.raises(ParameterError, match="'seed' is int"):
        sweep.run_sweep(book, "3", "seeds.yml")


def test_without_dask_it_says_what_to_install(book, monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(cluster.ClusterError, match=r"pip install 'ntkbook\[book,dask\]'"):
        sweep.run_sweep(book, "3", write(book, "jobs: [{}]"))


def test_the_stored_sweep_fits_its_chapter():
    root = Path(__file__).parents[1]
    for path in (root / "profiles" / "sweeps").glob("*.yml"):
        for profile in ("cpu", "quick"):
            nb = sweep.bare_notebook(root, "03_precipitation")
            jobs = sweep._plan(root, "03_precipitation", nb, path, profile, {}, check_device=True)
            assert len(jobs) == len({job.folder for job in jobs}) == len(sweep.read_sweep(path)[1])


def test_a_failed_job_is_kept_apart_and_only_it_runs_again(book, monkeypatch, capsys):
    monkeypatch.setenv("NTKBOOK_DATA", "here")
    path = write(
        book, "base: {scale: 2}\ngrid: {seed: [1, 2]}\njobs: [{seed: 3, names: [b, c], fail: true}, {seed: 1}]"
    )
    results = sweep.run_sweep(book, "3", path, profile="half", workers=2)
    told = capsys.readouterr()
    assert [result.status for result in results] == ["done", "done", "failed"]  # seed 1 comes twice, and runs once
    assert sorted(log(book)) == [1, 2, 3]
    assert {line.split()[1] for line in (book / "book" / "log").read_text("utf8").splitlines()} == {
        os.path.abspath("here")
    }
    assert "03_tiny (seed=3, names=['b', 'c'], fail=True): cell 4" in results[2].error
    assert "RuntimeError: asked to fail" in results[2].error
    assert told.err.count("\n") == 3
    assert "done 2/3, failed 1: " in told.err
    assert json.loads((results[1].folder / "card.json").read_text("utf8"))["parameters"] == {
        "profile": "half", "scale": 2, "seed": 2,
    }  # fmt: skip

    found = table(book, "sweep-s-half")
    assert {field.name: field.type for field in found.schema} == {
        **dict.fromkeys(("job", "status", "error", "profile", "params.profile", "params.names"), pa.string()),
        **dict.fromkeys(("claim", "criterion", "verdict", "data", "note"), pa.string()),
        **dict.fromkeys(("seconds", "peak_mib", "value", "low", "high", "params.scale"), pa.float64()),
        **dict.fromkeys(("n", "params.seed"), pa.int64()),
        **dict.fromkeys(("stand_in", "params.fail"), pa.bool_()),
    }
    rows = found.to_pylist()
    assert [(row["params.seed"], row["status"], row["claim"], row["value"], row["low"], row["n"]) for row in rows] == [
        (1, "done", "one", 2.0, 1.5, 3), (1, "done", "two", None, None, 0),
        (2, "done", "one", 4.0, 3.5, 3), (2, "done", "two", None, None, 0),
        (3, "failed", None, None, None, None),
    ]  # fmt: skip
    assert [row["verdict"] for row in rows] == ["reproduced", "not evaluated"] * 2 + [None]
    assert [row["job"] for row in rows[::2]] == [result.folder.name for result in results]
    assert rows[4]["error"] == results[2].error
    assert rows[4]["params.names"] == '["b", "c"]'
    assert rows[0]["params.names"] is None
    assert all(row["seconds"] > 0 for row in rows)

    (book / "book" / "mended").touch()
    results = sweep.run_sweep(book, "3", path, profile="half")
    told = capsys.readouterr().err
    assert [result.status for result in results] == ["fresh", "fresh", "done"]
    assert log(book)[3:] == [3]
    assert told.startswith("2 of 3 jobs are done already\ndone 3/3, failed 0: seed=3")
    assert table(book, "sweep-s-half")["status"].to_pylist() == ["done"] * 6

    monkeypatch.setattr(cluster, "local", lambda *a, **k: pytest.fail("nothing is left to run"))
    assert {result.status for result in sweep.run_sweep(book, "3", path, profile="half")} == {"fresh"}
    chapter = book / "book" / "03_tiny.md"
    chapter.write_text(TINY.replace("# Tiny", "# Small"), "utf8")  # prose
    sweep.run_sweep(book, "3", path, profile="half")
    chapter.write_text(TINY.replace("n=3", "n=4"), "utf8")
    with pytest.raises(pytest.fail.Exception, match="nothing is left"):
        sweep.run_sweep(book, "3", path, profile="half")
    assert table(book, "sweep-s-half")["status"].to_pylist() == ["pending"] * 3


def test_two_sweeps_do_not_share_a_folder(book, monkeypatch):
    """Not by profile, nor by a file's name; the same file, edited or moved, goes on with what is there."""
    monkeypatch.chdir(book)
    path, other = write(book, "jobs: [{seed: 1, data_dir: x}]"), write(book / "profiles", "jobs: [{seed: 2}]")

    def folder(path, profile="cpu"):
        monkeypatch.setattr(cluster, "local", lambda *a, **k: pytest.fail("it goes on"))
        with pytest.raises(pytest.fail.Exception, match="it goes on"):
            sweep.run_sweep(book, "3", path, profile=profile)
        (job,) = sweep._plan(
            book, "03_tiny", sweep.bare_notebook(book, "03_tiny"), path, profile, {}, check_device=True
        )
        return job

    assert folder(path).folder.parent.name == "sweep-s"
    assert folder(path).values["data_dir"] == str(book / "x")
    assert folder(path, "half").folder.parent.name == "sweep-s-half"
    with pytest.raises(ValueError, match=rf"sweep-s has the results of {path}; rename {other}, or remove"):
        sweep.run_sweep(book, "3", other)
    path.unlink()
    assert folder(other).folder.parent.name == "sweep-s"


def test_a_scheduler_by_its_address(book, monkeypatch):
    """Also: a job that its worker cannot start has failed, and a changed chapter runs again."""
    from distributed import LocalCluster

    monkeypatch.delenv("NTKBOOK_DATA", raising=False)
    path = write(book, "grid: {seed: [1, 2]}")
    with LocalCluster(n_workers=2, threads_per_worker=1, host="127.0.0.1", dashboard_address="127.0.0.1:0") as running:
        monkeypatch.setenv("NTKBOOK_DATA", "there")  # after the workers' start: it must come with the jobs
        first, second = sweep.run_sweep(book, "3", path, scheduler=running.scheduler_address, progress=False)
        assert (first.status, second.status) == ("done", "done")
        assert sorted((book / "book" / "log").read_text("utf8").splitlines()) == [
            f"{i} {os.path.abspath('there')}" for i in (1, 2)
        ]

        chapter = book / "book" / "03_tiny.md"
        chapter.write_text(TINY.replace("n=3", "n=4"), "utf8")
        for old in second.folder.iterdir():
            old.unlink()
        second.folder.rmdir()
        second.folder.touch()  # a file in the folder's place
        again = sweep.run_sweep(book, "3", path, scheduler=running.scheduler_address, progress=False)
    assert [result.status for result in again] == ["done", "failed"]
    assert "03_tiny (seed=2): FileExistsError" in again[1].error
    assert table(book)["n"].to_pylist() == [4, 0, None]


def test_a_worker_that_is_not_fit_says_why(book):
    name = "03_tiny"
    nb = notebooks.from_text(book / "book" / f"{name}.md")
    job = sweep.Job("", {"seed": 1}, book / "x", runcard.fingerprint(book, name, nb, {"seed": 1}))
    environment = runcard.environment()
    token = book / "token"
    shared = sweep._Shared(book, name, nb, "cpu", False, token, environment)
    with pytest.raises(ValueError, match=f"it does not see {book}; a sweep needs a file system"):
        sweep._check(shared, job)
    token.touch()
    sweep._check(shared, job)
    (book / "requirements.lock").write_text("torch==0\n", "utf8")
    with pytest.raises(ValueError, match=r"its ntkbook, Python, packages or requirements\.lock differ"):
        sweep._check(shared, job)


@pytest.mark.skipif(sys.platform == "win32", reason="signals are sent to a process group")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_an_interruption_loses_nothing(book, how):
    path = write(book, "jobs: [{seed: 1}, {seed: 2, wait: true}]")
    # Jobs in the background of a shell ignore Ctrl-C, and so would their children.
    heed = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    code = heed + "from ntkbook.publish.cli import main; main()"
    arguments = [sys.executable, "-c", code, "run", "3", "--sweep", str(path), "--workers", "1"]
    coordinator = subprocess.Popen(
        arguments, cwd=book, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    until(lambda: log(book) == [1, 2] or coordinator.poll() is not None)  # the second job waits
    if how == signal.SIGINT:
        os.killpg(coordinator.pid, how)  # as a terminal does
    else:
        coordinator.kill()
    told = coordinator.communicate(timeout=300)[1]
    assert coordinator.returncode == (130 if how == signal.SIGINT else -how), told
    if how == signal.SIGINT:
        assert "interrupted: what is done is kept, and the same command runs the rest" in told
        assert "Traceback" not in told
    assert table(book)["status"].to_pylist() == ["done", "done", "pending"]  # two claims, and the job that waited
    (book / "book" / "mended").touch()
    results = sweep.run_sweep(book, "3", path, progress=False)
    assert [result.status for result in results] == ["fresh", "done"]
    assert log(book)[:2] == [1, 2]
    assert set(log(book)[2:]) <= {2}  # the killed worker's kernel may still have ended the job by itself
    assert table(book)["status"].to_pylist() == ["done"] * 4


def until(true, seconds=600):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.1)
