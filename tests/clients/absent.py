"""Runs inside vLLM's environment: a stand-in for torchvision, which has no build for CPUs here."""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types


class Absent(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """What classes import of torchvision at their top is there in name only."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] != "torchvision":
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        def named(name):
            if name.startswith("__"):
                raise AttributeError(name)
            return type(name, (), {})

        module = types.ModuleType(spec.name)
        module.__getattr__ = named
        return module

    def exec_module(self, module):
        pass


def stand_in() -> None:
    """For torchvision, where it is missing. To be called when transformers has looked for it already."""
    if importlib.util.find_spec("torchvision") is None:
        sys.meta_path.append(Absent())
