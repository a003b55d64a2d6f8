"""The README: its console blocks show what their commands really print ("..." stands for anything)."""

import doctest
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).resolve().parents[1] / "README.md"
BLOCKS = re.findall(r"```console\n\$ (.*?)\n(.*?)```", README.read_text(), re.DOTALL)


def test_the_blocks_are_found():
    assert len(BLOCKS) == 2


@pytest.mark.parametrize(("command", "expected"), BLOCKS, ids=[command for command, _ in BLOCKS])
def test_output(command, expected):
    program, *arguments = shlex.split(command)
    assert program == "loracle"
    printed = subprocess.run([sys.executable, "-m", "loracle.cli", *arguments], capture_output=True, text=True).stdout
    assert doctest.OutputChecker().check_output(expected, printed, doctest.ELLIPSIS), printed


def test_the_counts_of_the_text_are_those_of_the_run():
    from loracle.oracle_tests import conformance

    outcomes = [row["outcome"] for row in conformance.published("peft_lora_ga")["laws"].values()]
    assert f"({outcomes.count('expected to fail')} laws fail, {outcomes.count('holds')} hold)" in README.read_text()
