"""The scripts as a user runs them, each in a process of its own, and the README's promises."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from conftest import ROOT


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
    train = run(ROOT / "train.py", "--epochs", "1", "--batch-size", "8", cwd=tmp_path)
    assert (train.returncode, train.stderr) == (0, "")
    assert "56,880,515 parameters" in train.stdout and "now classify a photo" in train.stdout
    photo = next((tmp_path / "data" / "val").rglob("*.jpg"))
    predict = run(ROOT / "predict.py", photo, cwd=tmp_path)
    assert (predict.returncode, predict.stderr) == (0, "the figure is in prediction.png\n")
    assert re.match(r"class: \w+, probability: [01]\.\d{3}\n", predict.stdout)
    assert (tmp_path / "prediction.png").stat().st_size > 5000


def test_mistakes_end_in_one_line_and_status_1_without_a_traceback(tmp_path):
    for script, *argv in (
        ("split_data.py", "--source", "nowhere"),
        ("train.py", "--data", "nowhere"),
        ("predict.py", "nowhere.jpg"),
    ):
        result = run(ROOT / script, *argv, cwd=tmp_path)
        assert result.returncode == 1 and result.stdout == ""
        assert re.fullmatch(r"error: [^\n]+\n", result.stderr), result.stderr
    assert not list(tmp_path.iterdir())


def test_a_console_without_the_letters_of_a_name_does_not_crash(tmp_path):
    result = run(
        *(ROOT / "predict.py", "Löwenzahn 蒲公英.jpg", "--weights", "蒲公英.pth"),
        cwd=tmp_path,
        PYTHONIOENCODING="ascii",
    )
    assert result.returncode == 1 and "\\u84b2" in result.stderr


def test_help_names_every_option():
    for script, options in (
        ("split_data.py", ("--source", "--output", "--val-rate", "--test-rate", "--seed")),
        ("train.py", ("--data", "--accumulate", "--resume", "--precision", "--crop-area")),
        ("predict.py", ("--weights", "--top-k", "--views", "--json", "--save", "--similar")),
    ):
        result = run(ROOT / script, "--help", cwd=ROOT)
        assert result.returncode == 0 and all(option in result.stdout for option in options)
        assert f"python {script}" in result.stdout


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
