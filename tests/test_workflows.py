"""The workflows: what they may do, what they run, and that they keep what they promise."""

import importlib.util
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PATHS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
WORKFLOWS = {path.stem: yaml.safe_load(path.read_text("utf8")) for path in PATHS}
STEPS = [(name, step) for name, flow in WORKFLOWS.items() for job in flow["jobs"].values() for step in job["steps"]]
SCRIPTS = [(name, step["run"]) for name, step in STEPS if "run" in step]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf8"))["project"]


def triggers(name):
    return WORKFLOWS[name][True]  # YAML 1.1 reads the key `on` as true


def oldest_lock():
    spec = importlib.util.spec_from_file_location("oldest_lock", ROOT / ".ci" / "oldest_lock.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.oldest_lock()


def test_there_are_three():
    assert set(WORKFLOWS) == {"ci", "gpu", "publish"}


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_actions_are_pinned_by_commit_with_the_version_beside(path):
    uses = [line.strip() for line in path.read_text("utf8").splitlines() if re.search(r"\buses:", line)]
    assert uses
    for line in uses:
        assert re.fullmatch(r"(- )?uses: actions/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", line), line


def test_one_action_has_one_version():
    pins = {step["uses"] for _, step in STEPS if "uses" in step}
    assert len(pins) == len({pin.split("@")[0] for pin in pins}), sorted(pins)


def test_only_the_deployment_may_write():
    for name, flow in WORKFLOWS.items():
        assert flow["permissions"] == {"contents": "read"}, name
        for job, facts in flow["jobs"].items():
            allowed = {"pages": "write", "id-token": "write"} if (name, job) == ("publish", "deploy") else None
            assert facts.get("permissions") == allowed, f"{name}: {job}"
            assert facts["timeout-minutes"] > 0


def test_no_checkout_leaves_its_token_behind():
    checkouts = [step for _, step in STEPS if step.get("uses", "").startswith("actions/checkout@")]
    assert len(checkouts) == 3
    assert all(step["with"]["persist-credentials"] is False for step in checkouts)


def test_scripts_take_no_text_from_outside():
    for name, script in SCRIPTS:
        inserted = set(re.findall(r"\$\{\{\s*(.*?)\s*\}\}", script))
        assert inserted <= {"matrix.lock"}, f"{name}: pass {inserted} by an environment variable"


def test_every_command_is_there():
    from typer.main import get_command

    from ntkbook.publish import cli

    commands = get_command(cli.app).commands  # pyright: ignore[reportAttributeAccessIssue]
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text("utf8"), re.MULTILINE))
    found = []
    for name, script in SCRIPTS:
        for words in re.findall(r"^\s*\.venv/bin/ntkbook (.*)", script, re.MULTILINE):
            found.append(command := words.split()[0])
            assert command in commands, f"{name}: ntkbook {command}"
            options = {option for parameter in commands[command].params for option in parameter.opts}
            assert set(re.findall(r"(?<=\s)--[\w-]+", words)) <= options, f"{name}: ntkbook {words}"
        for target in re.findall(r"\bmake ([a-z]+)", script):
            found.append(target)
            assert target in targets, f"{name}: make {target}"
        for path in re.findall(r"\bpython ([\w./]+\.py)", script):
            found.append(path)
            assert (ROOT / path).is_file(), f"{name}: {path}"
    assert {"run", "claims", "install", "test", "lint", "html", ".ci/oldest_lock.py"} <= set(found)


def test_gpu_runs_by_hand_weekly_and_by_label():
    on = triggers("gpu")
    assert set(on) == {"workflow_dispatch", "schedule", "pull_request"}
    (weekly,) = on["schedule"]
    assert re.fullmatch(r"\d+ \d+ \* \* [0-6]", weekly["cron"])
    assert on["pull_request"] == {"types": ["labeled"]}
    for job in WORKFLOWS["gpu"]["jobs"].values():
        assert "github.event.label.name == 'gpu'" in job["if"]


def test_gpu_runs_where_a_variable_says_or_says_why_not():
    jobs = WORKFLOWS["gpu"]["jobs"]
    assert jobs["chapters"]["runs-on"] == "${{ vars.GPU_RUNNER }}"
    assert "vars.GPU_RUNNER != ''" in jobs["chapters"]["if"]
    assert "vars.GPU_RUNNER == ''" in jobs["no-runner"]["if"]
    (step,) = jobs["no-runner"]["steps"]
    assert "Skipped" in step["run"]
    assert "$GITHUB_STEP_SUMMARY" in step["run"]


def test_no_other_label_cancels_a_gpu_run_that_waits():
    assert "concurrency" not in WORKFLOWS["gpu"]
    assert WORKFLOWS["gpu"]["jobs"]["chapters"]["concurrency"] == {"group": "gpu", "cancel-in-progress": False}


def test_gpu_keeps_what_there_is_when_a_chapter_fails():
    steps = WORKFLOWS["gpu"]["jobs"]["chapters"]["steps"]
    assert not any("continue-on-error" in step for step in steps), "a chapter that fails must fail the job"
    (run,) = [i for i, step in enumerate(steps) if "ntkbook run" in step.get("run", "")]
    assert "--profile gpu" in steps[run]["run"]
    scorecard, upload = steps[run + 1 :]
    assert scorecard["if"] == upload["if"] == "always()"
    assert scorecard["run"].count("ntkbook claims --profile gpu") == 2
    for kept in ("notebook.ipynb", "card.json", "claims.json", "figures", "tables"):
        assert f"runs/*/gpu/{kept}" in upload["with"]["path"].split()
    assert "runs/scorecard.*" in upload["with"]["path"].split()
    assert WORKFLOWS["gpu"]["defaults"]["run"]["shell"] == "bash", "without pipefail a failing scorecard goes unseen"


def test_publish_builds_from_the_stored_notebooks_and_deploys():
    jobs = WORKFLOWS["publish"]["jobs"]
    assert set(triggers("publish")) == {"workflow_run", "workflow_dispatch"}
    assert triggers("publish")["workflow_run"] == {"workflows": ["ci"], "types": ["completed"], "branches": ["main"]}
    assert WORKFLOWS["ci"]["name"] == "ci"
    for needed in ("workflow_run.event == 'push'", "workflow_run.conclusion == 'success'"):
        assert f"github.event.{needed}" in jobs["build"]["if"], "what ci.yml has not passed is not shown"
    assert jobs["build"]["steps"][0]["with"]["ref"] == "${{ github.event.workflow_run.head_sha || github.sha }}"
    assert [step["run"] for step in jobs["build"]["steps"] if "run" in step] == ["make html PYTHON=python"]
    assert jobs["build"]["steps"][0]["with"]["fetch-depth"] == 0, "the dates of last changes need the history"
    assert jobs["build"]["steps"][-1]["with"] == {"path": "_build/html"}
    assert jobs["deploy"]["needs"] == "build"
    assert jobs["deploy"]["environment"]["name"] == "github-pages"


def test_ci_tests_the_oldest_and_the_newest():
    matrix = WORKFLOWS["ci"]["jobs"]["test"]["strategy"]["matrix"]["include"]
    pythons = [entry.rpartition(" ")[2] for entry in PROJECT["classifiers"] if "Python :: 3." in entry]
    assert [(entry["python"], entry["lock"]) for entry in matrix] == [
        (pythons[0], "oldest.lock"),
        (pythons[-1], "requirements.lock"),
    ]


def test_the_oldest_lock_differs_from_the_lock_in_torch_alone():
    def pins(text):
        lines = [line.split(" \\")[0] for line in text.splitlines() if line and line[0] not in " #-"]
        return {requirement.name: requirement for line in lines for requirement in [Requirement(line)]}

    oldest, newest = pins(oldest_lock()), pins((ROOT / "requirements.lock").read_text("utf8"))
    (wanted,) = [Requirement(text) for text in PROJECT["dependencies"] if text.startswith("torch")]
    (lowest,) = [spec.version for spec in wanted.specifier if spec.operator == ">="]
    assert str(oldest["torch"].specifier) == f"=={lowest}.*"
    assert str(oldest["torchvision"].specifier) == ""
    gone = set(newest) - set(oldest)
    assert all(re.fullmatch(r"triton|setuptools|nvidia-.*|cuda-.*", name) for name in gone), gone
    assert not set(oldest) - set(newest)
    assert all(oldest[name] == newest[name] for name in set(oldest) - {"torch", "torchvision"})
    assert "numpy" in oldest


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_actionlint_finds_nothing(path):
    if not shutil.which("actionlint"):
        pytest.skip("actionlint is not installed")
    done = subprocess.run(["actionlint", str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
