"""demo.ipynb, executed from the first to the last cell with fewer steps of a smaller model."""

import json
import subprocess
import sys

import psutil
import pytest
from conftest import ROOT

pytest.importorskip('nbclient')
pytest.importorskip('ipykernel')
pytest.importorskip('transformers')

NOTEBOOK = ROOT / 'demo.ipynb'
# In a separate process, so that the warnings of its libraries are not ours
EXECUTE = """
import sys
import nbclient, nbformat
notebook, result, root = sys.argv[1:]
cells = nbformat.read(notebook, 4)
small = 'config/quickstart.py --n_layer=2 --n_embd=64 --n_head=2'
(cell,) = [cell for cell in cells.cells if 'train.py config/quickstart.py' in cell.source]
cell.source = cell.source.replace('config/quickstart.py', small)
nbformat.validate(cells)
resources = {'metadata': {'path': root}}
nbclient.NotebookClient(cells, timeout=300, kernel_name='python3', resources=resources).execute()
nbformat.write(cells, result)
"""


def files_of_checkout():
    patterns = ('*', 'data/*/*', 'out/*')
    found = {path for pattern in patterns for path in ROOT.glob(pattern)}
    return {path for path in found if path.name != '.prepare.lock'}  # which another test may take


@pytest.fixture(scope='module')
def executed(tmp_path_factory, environment):
    """The notebook's cells with their outputs, and the folder that they wrote to."""
    folder = tmp_path_factory.mktemp('demo')
    settings = {
        'FLATGPT_DEMO': str(folder / 'work'),
        'FLATGPT_DEMO_STEPS': '8',
        'JUPYTER_RUNTIME_DIR': str(folder / 'runtime'),
        'JUPYTER_PLATFORM_DIRS': '1',
        'PYTHONDONTWRITEBYTECODE': '1',
    }
    before = files_of_checkout()
    result = folder / 'result.ipynb'
    done = subprocess.run(
        [sys.executable, '-c', EXECUTE, str(NOTEBOOK), str(result), str(ROOT)],
        env={**environment, **settings}, capture_output=True, encoding='utf-8',
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert files_of_checkout() == before
    return cells_of(result), folder


def cells_of(path):
    return json.loads(path.read_text(encoding='utf-8'))['cells']


def cells_with_code(cells):
    return [cell for cell in cells if cell['cell_type'] == 'code']


def test_the_notebook_is_committed_without_outputs():
    for cell in cells_of(NOTEBOOK):
        assert not cell.get('outputs')
        assert cell.get('execution_count') is None


def test_every_step_of_the_notebook_works(executed):
    cells, folder = executed
    outputs = [output for cell in cells for output in cell.get('outputs', ())]
    printed = ''.join(''.join(output.get('text', '')) for output in outputs)
    for word in (
        'train, ',
        'step 8: train loss',
        'step 1: train loss',
        'validation loss',
        '---------------',
        'written to',
    ):
        assert word in printed
    said = [o for o in cells_with_code(cells)[-1]['outputs'] if o.get('name') == 'stdout']
    assert ''.join(''.join(output['text']) for output in said).startswith('python train.py')
    assert sum('image/png' in output.get('data', {}) for output in outputs) == 1
    assert not [output for output in outputs if output['output_type'] == 'error']
    assert (folder / 'work' / 'for-transformers' / 'config.json').is_file()


def test_the_notebook_leaves_no_process_behind(executed):
    _, folder = executed
    lines = [
        ' '.join(process.info['cmdline'] or ()) for process in psutil.process_iter(['cmdline'])
    ]
    assert not [line for line in lines if str(folder) in line]
