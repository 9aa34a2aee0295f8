"""Both notebooks run from the first cell to the last, with small settings, in a kernel of their own."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from report_fixtures import write_run

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = ROOT / "notebooks"


def execute(name: str) -> nbformat.NotebookNode:
    """The notebook with its outputs. Raises CellExecutionError if a cell raises."""
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    NotebookClient(notebook, timeout=500, kernel_name="python3", resources={"metadata": {"path": NOTEBOOKS}}).execute()
    return notebook


def texts(notebook: nbformat.NotebookNode) -> str:
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return "".join(output.get("text") or output.get("data", {}).get("text/html", "") for output in outputs)


def pictures(notebook: nbformat.NotebookNode) -> int:
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return sum("image/png" in output.get("data", {}) for output in outputs)


@pytest.fixture
def environment(monkeypatch, tmp_path):
    kernel = tmp_path / "jupyter/kernels/python3"  # the Python of the tests, whatever kernels are installed
    kernel.mkdir(parents=True)
    words = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec = f'{{"argv": {words}, "display_name": "Python 3", "language": "python"}}'
    (kernel / "kernel.json").write_text(spec.replace("'", '"'))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    return monkeypatch


@pytest.mark.slow
def test_the_first_notebook_trains_and_looks_at_the_run(environment, tmp_path):
    environment.setenv("NANOGRPO_SMALL_NOTEBOOK", "1")
    environment.setenv("NANOGRPO_NOTEBOOK_RUN", str(tmp_path / "run"))
    notebook = execute("nanogrpo")
    said = texts(notebook)
    assert "step 2/2 | reward" in said
    assert said.count("step 1/2 | reward") == 1  # not redrawn
    assert "solved, sampled:" in said
    assert "--- after training" in said
    assert "title='ratio " in said
    assert pictures(notebook) == 2


@pytest.mark.slow
def test_the_results_of_several_runs(environment, tmp_path):
    write_run(tmp_path / "a", seed=1)
    write_run(tmp_path / "b", seed=2)
    write_run(tmp_path / "broken")
    (tmp_path / "broken/metrics.jsonl").write_text("nothing\n")
    environment.setenv("NANOGRPO_NOTEBOOK_RUNS", str(tmp_path))
    notebook = execute("results")
    said = texts(notebook)
    assert "left out: " in said
    assert "<th>solved after</th>" in said
    assert "<th>seed</th>" in said.rpartition("<table")[2]  # of the settings, those that differ
    assert pictures(notebook) == 1


def test_the_notebooks_hold_no_outputs():
    """Outputs would be old, and make every change of a notebook large."""
    for path in NOTEBOOKS.glob("*.ipynb"):
        for cell in nbformat.read(path, as_version=4).cells:
            assert cell.cell_type != "code" or (cell.outputs == [] and cell.execution_count is None), path


def test_the_first_notebook_says_what_it_needs_if_it_is_opened_alone(tmp_path, monkeypatch):
    shutil.copy(NOTEBOOKS / "nanogrpo.ipynb", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NANOGRPO_REPOSITORY", raising=False)
    first = next(c for c in nbformat.read("nanogrpo.ipynb", as_version=4).cells if c.cell_type == "code")
    with pytest.raises(FileNotFoundError, match="open the notebook inside the repository"):
        exec(first.source, {})
