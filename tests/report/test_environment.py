"""The record of where a number was measured."""

import json
import subprocess

import torch

from lightning_mat.report import environment as module
from lightning_mat.report.environment import environment

FIELDS = {
    "time",
    "commit",
    "modified",
    "platform",
    "python",
    "torch",
    "lightning",
    "lightning_mat",
    "cuda",
    "device",
    "cpu",
    "cores",
    "threads",
}


def test_record_is_plain_json_and_complete():
    found = environment()
    assert set(found) == FIELDS
    assert json.loads(json.dumps(found)) == found
    assert found["device"] == "cpu"
    assert found["cpu"]
    assert found["cores"] >= 1
    assert found["threads"] == torch.get_num_threads()


def test_commit_and_changes_are_those_of_the_checkout(tmp_path):
    def git(*command):
        names = ("-c", "user.name=a", "-c", "user.email=a@b")
        return subprocess.run(
            ["git", "-C", str(tmp_path), *names, *command],
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()

    git("init", "-q")
    assert module._git(tmp_path, "rev-parse", "HEAD") is None  # no commit yet
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-q", "-m", "first")
    assert module._git(tmp_path, "rev-parse", "HEAD") == git("rev-parse", "HEAD")
    (tmp_path / "inner").mkdir()
    assert module._git(tmp_path / "inner", "rev-parse", "HEAD") is None  # not its own checkout


def test_a_package_that_is_not_installed_has_no_version():
    assert module._version("surely-not-a-package") is None
    assert module._version("torch").split("+")[0] == torch.__version__.split("+")[0]
