"""The example notebook runs from top to bottom, and what it trains is better than chance."""

import re
from pathlib import Path

import nbclient
import nbformat
import pytest

NOTEBOOK = Path(__file__).parents[1] / "docs" / "notebooks" / "first_reward_model.ipynb"

pytestmark = pytest.mark.timeout(900)


def printed(notebook):
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    return "".join(output.text for output in outputs if output.output_type == "stream")


def images(notebook):
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    return sum("image/png" in output.get("data", {}) for output in outputs)


def check(notebook):
    found = re.findall(r"finetune: accuracy (\S+) \[(\S+), (\S+)\]", printed(notebook))
    assert len(found) == 1
    value, low, high = map(float, found[0])
    assert 0.5 < low <= value <= high
    assert images(notebook) == 4
    assert "log-probs: [-" in printed(notebook)


def test_the_notebook_runs_and_its_model_is_better_than_chance(tmp_path):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in notebook.cells:
        cell.pop("outputs", None)
        if cell.cell_type == "code":
            cell.outputs = []
    client = nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    )
    client.execute()
    check(notebook)


def test_the_outputs_that_are_kept_with_it_are_those_of_a_whole_run():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
    check(notebook)
