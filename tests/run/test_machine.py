"""The machine of a run is written down in words."""

from __future__ import annotations

import json
import os

import torch

from run.config import Config
from run.machine import describe_machine
from run.run_log import RunLog


def test_the_machine_has_its_cores_and_versions():
    found = describe_machine()
    assert f"{os.cpu_count()} cores" in found["machine"]
    assert f"PyTorch {torch.__version__}" in found["software"]


def test_a_run_writes_its_machine_down(tmp_path):
    with RunLog(tmp_path, Config(), total_steps=1):
        assert json.loads((tmp_path / "machine.json").read_text()) == describe_machine()
