"""
The library behind the scripts at the root of a clone: train.py, sample.py, bench.py, api.py.

After `import flatgpt`, `import model` imports this clone's model.py, even if the current directory
contains another model.py: the scripts and the library must share one GPT class.
"""

import importlib.util
import sys
import time
from pathlib import Path

STARTED = time.perf_counter()  # of the process, before the slow imports
ROOT = Path(__file__).resolve().parents[1]  # the clone: its scripts, config/ and data/
_MODEL = ROOT / 'model.py'

if not (_MODEL.is_file() and (ROOT / 'train.py').is_file()):
    raise ImportError(
        f'flatgpt runs from a clone, and {ROOT} is not one; run git clone, then '
        '`pip install -e .` in the clone',
        name='flatgpt',  # `python -m flatgpt.checkpoint` then prints it without a traceback
    )


class _CloneFinder:
    """Finds only the top-level module `model`."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        return importlib.util.spec_from_file_location(name, _MODEL) if name == 'model' else None


_loaded = getattr(sys.modules.get('model'), '__file__', None)
if _loaded and Path(_loaded).resolve() != _MODEL:
    raise ImportError(f'import flatgpt before another module called model ({_loaded})')
sys.meta_path.insert(0, _CloneFinder)
