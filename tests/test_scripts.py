"""The scripts as a user runs them, each in a process of its own, and the README's promises."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from conftest import POSIX, ROOT


def run(*argv: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, argv)],
        cwd=cwd,
        env=os.environ | {"MPLBACKEND": "agg", "PYTHONIOENCODING": "utf-8"} | environment,
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )


def test_split_train_predict_end_to_end(photos, tmp_path):
    split = run(ROOT / "split_data.py", "--source", photos, "--val-rate", "0.2", cwd=tmp_path)
    assert (split.returncode, split.stderr) == (0, "") and "total" in split.stdout
    backend = {"MPLBACKEND": "module://lacking_inline.backend_inline"}  # as under a notebook
    options = ("--epochs", "1", "--batch-size", "8", "--device", "cpu")
    train = run(ROOT / "train.py", *options, cwd=tmp_path, **backend)
    assert (train.returncode, train.stderr) == (0, "")
    assert "56,880,515 parameters" in train.stdout and "now classify a photo" in train.stdout
    photo = next((tmp_path / "data" / "val").rglob("*.jpg"))
    predict = run(ROOT / "predict.py", photo, "--device", "cpu", cwd=tmp_path, **backend)
    assert (predict.returncode, predict.stderr) == (0, "the figure is in prediction.png\n")
    assert re.match(r"class: \w+, probability: [01]\.\d{3}\n", predict.stdout)
    assert (tmp_path / "prediction.png").stat().st_size > 5000


def test_help_has_examples_and_a_mistake_ends_in_one_line_and_status_1(tmp_path):
    wrong = "split_data.py --source nowhere, train.py --data nowhere, predict.py nowhere.jpg"
    for script, *argv in map(str.split, wrong.split(", ")):
        shown = run(ROOT / script, "--help", cwd=tmp_path)
        assert shown.returncode == 0 and f"python {script}" in shown.stdout
        result = run(ROOT / script, *argv, cwd=tmp_path)
        assert result.returncode == 1 and result.stdout == ""
        assert re.fullmatch(r"error: [^\n]+\n", result.stderr), result.stderr
    assert not list(tmp_path.iterdir())


def test_a_console_without_the_letters_of_a_name_does_not_crash(tmp_path):
    (tmp_path / "photos" / "蒲公英").mkdir(parents=True)  # which has no photos, and is named
    argv = (ROOT / "split_data.py", "--source", "photos")
    result = run(*argv, cwd=tmp_path, PYTHONIOENCODING="ascii")
    assert "\\u84b2" in result.stdout and result.stderr.startswith("error: ")


@POSIX
def test_without_a_console_all_is_done(photos, tmp_path):
    command = f"{sys.executable} {ROOT / 'split_data.py'} --source {photos} --output data"
    for number, closed in enumerate(("2>&-", ">&-", ">&- 2>&-")):
        done = subprocess.run(
            f"{command}{number} --val-rate 0.2 {closed}", shell=True, cwd=tmp_path
        )
        assert done.returncode == 0
    options = "--data data0 --epochs 1 --batch-size 8 --device cpu"
    train = f"{sys.executable} {ROOT / 'train.py'} {options} >&- 2>&-"
    assert subprocess.run(train, shell=True, cwd=tmp_path).returncode == 0
    assert (tmp_path / "run.json").exists()


def test_importing_a_script_runs_nothing_and_predict_starts_without_torchvision(tmp_path):
    code = "import sys, {0}; print('torchvision' in sys.modules)"
    for module in ("split_data", "alexnet", "predict"):
        result = run("-c", code.format(module), cwd=tmp_path, PYTHONPATH=str(ROOT))
        assert (result.stdout.strip(), result.stderr) == ("False", "")
    assert not list(tmp_path.iterdir())


def test_ci_runs_the_two_commands_of_the_readme_word_for_word():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = re.findall(r"```sh\n(python3 -m venv .*?)\n```", readme, re.DOTALL)
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert len(commands) == 2
    assert all(command in script for command in commands)


def test_the_chinese_readme_has_commands_of_the_english_one():
    blocks = []
    for name in ("README.md", "docs/README.zh-CN.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        blocks.append(re.findall(r"```sh\n(.*?)```", text, re.DOTALL))
    english, chinese = blocks
    assert len(chinese) == 3 and set(chinese) <= set(english)
