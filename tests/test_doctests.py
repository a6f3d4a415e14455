"""Every example in a docstring runs, and every public class has one."""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import inspect
import pkgutil

import pytest

import anybatch

OPTIONAL = {"anybatch.data.images": "PIL"}  # modules whose examples need an extra, and what they import of it
ROOMS = ("caching", "family", "insight", "losses", "mining", "integrations.sentence_transformers")
MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(anybatch.__path__, "anybatch.")
    if module.name != "anybatch.__main__"
)


def public_classes() -> dict[str, type]:
    """By their dotted names: what the package and its rooms list in `__all__`, and the settings."""
    from anybatch.core.configuration import Configuration

    named = [(anybatch, name) for name in anybatch.__all__]
    for room in ROOMS:
        module = importlib.import_module(f"anybatch.{room}")
        named += [(module, name) for name in module.__all__]
    for module in MODULES:
        importlib.import_module(module)
    settings = [kind for kind in Configuration.__subclasses__() if kind.__module__.startswith("anybatch.")]
    values = [getattr(module, name) for module, name in named] + settings
    return {f"{kind.__module__}.{kind.__qualname__}": kind for kind in values if inspect.isclass(kind)}


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_run(name, tmp_path, monkeypatch):
    if name in OPTIONAL and importlib.util.find_spec(OPTIONAL[name]) is None:
        pytest.skip(f"{name} needs {OPTIONAL[name]}")
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(name)
    runner, said = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS), []
    for test in doctest.DocTestFinder().find(module):
        runner.run(test, out=said.append)
    assert not runner.summarize(verbose=False).failed, "".join(said)


def test_every_public_class_has_an_example():
    without = {
        name
        for name, kind in public_classes().items()
        if not (kind.__module__.startswith("anybatch") and doctest.DocTestParser().get_examples(kind.__doc__ or ""))
    }
    assert not without
