import inspect
import sys
import types

import pytest


@pytest.fixture
def mutated(request):
    """mutated(module, line, broken): a copy of the module with one piece of source replaced."""

    def make(module, line, broken):
        source = inspect.getsource(module)
        assert source.count(line) == 1, f"{line!r} is {source.count(line)} times in {module}"
        copy = types.ModuleType(f"{module.__name__}_mutated")
        sys.modules[copy.__name__] = copy  # dataclasses look their module up
        request.addfinalizer(lambda: sys.modules.pop(copy.__name__, None))
        exec(compile(source.replace(line, broken), module.__file__, "exec"), copy.__dict__)
        return copy

    return make
