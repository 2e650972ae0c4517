"""The mark of tests that let inductor compile C++."""

import pytest
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler


def _has_cpp_compiler() -> bool:
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return False
    return True


needs_cpp_compiler = pytest.mark.skipif(not _has_cpp_compiler(), reason="inductor finds no C++ compiler")
