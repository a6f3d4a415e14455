from __future__ import annotations

import subprocess
import sys

import anybatch


def test_public_names_exist_and_are_few():
    assert len(anybatch.__all__) < 20
    assert all(getattr(anybatch, name) is not None for name in anybatch.__all__)


def test_importing_anybatch_imports_nothing_heavy():
    code = "import sys, anybatch; print([m for m in ('torch', 'numpy', 'scipy', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_mining_and_losses_do_not_import_the_trainer():
    code = (
        "import sys, anybatch.mining, anybatch.losses, anybatch.caching, anybatch.plans.plan, anybatch.losses.rows; "
        "print('transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
