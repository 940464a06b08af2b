"""Every notebook runs from its first cell to its last, and shows what it has shown then."""

import ast
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
SIZE = 200_000
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)


def code_of(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def shown_by(cell):
    """The kinds of the outputs of a cell, without warnings, which differ from machine to machine."""
    return {output.get("name", output.output_type) for output in cell.outputs} - {"stderr"}


def prints_or_draws(source):
    """Whether a cell calls ``print`` or ``plt.show``, or draws a figure, outside of the functions that it defines."""
    outer = [node for node in ast.parse(source).body if not isinstance(node, ast.FunctionDef | ast.ClassDef)]
    called = {ast.unparse(node.func) for top in outer for node in ast.walk(top) if isinstance(node, ast.Call)}
    return not called.isdisjoint({"print", "plt.show", "plt.subplots", "plt.figure"})


@each
def test_notebook_keeps_its_outputs_and_stays_small(path):
    cells = code_of(path)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), "run once, from the first on"
    assert [cell.source for cell in cells if prints_or_draws(cell.source) and not shown_by(cell)] == []
    assert {"stderr", "error"}.isdisjoint(output.get("name", output.output_type) for c in cells for output in c.outputs)
    assert path.stat().st_size < SIZE


@pytest.mark.numbers  # they compute for longer than they compile
@pytest.mark.slow
@each
def test_notebook_runs(path, tmp_path):
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}})
    client.execute()
    ran = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [shown_by(cell) for cell in ran] == [shown_by(cell) for cell in code_of(path)]
