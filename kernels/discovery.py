"""Plug-ins are found by their file names: one file in a folder is one plug-in.

A method, a format, a search strategy and an evaluator are modules that define one agreed function
(``compress``, ``pack``, ``search`` …); the other modules of the folder are shared code and do not
define it. Nothing is registered by hand. Modules whose names begin with an underscore are private
to one plug-in and never imported from here: they may need what is not installed everywhere.
"""

import importlib
import pkgutil
from functools import cache
from types import ModuleType


class UnknownName(LookupError):
    """A plug-in was asked for by a name that no file has; the message lists the known names."""


@cache
def plugins(package: str, markers: tuple[str, ...]) -> dict[str, ModuleType]:
    """Modules of ``package`` that define one of ``markers``, by file name, in alphabetical order.

    Args:
        package: import name of a folder, such as ``moesaic.methods``.
        markers: names of functions, each of which makes a module a plug-in of this kind.
    """
    found: dict[str, ModuleType] = {}
    for name in _public(package):
        module = importlib.import_module(f"{package}.{name}")
        if any(hasattr(module, marker) for marker in markers):
            found[name] = module
    return found


def _public(package: str) -> list[str]:
    folder = importlib.import_module(package)
    infos = sorted(pkgutil.iter_modules(folder.__path__), key=lambda info: info.name)
    return [info.name for info in infos if not info.ispkg and not info.name.startswith("_")]


@cache
def plugin(package: str, markers: tuple[str, ...], name: str) -> ModuleType:
    """The plug-in ``name`` of ``package``; raises :class:`UnknownName` with the known names."""
    if name in _public(package):  # the others may take long to import
        module = importlib.import_module(f"{package}.{name}")
        if any(hasattr(module, marker) for marker in markers):
            return module
    known = plugins(package, markers)
    if name not in known:
        kind = package.rpartition(".")[2]
        raise UnknownName(f"unknown name {name!r} in {kind}: known are {', '.join(known)}")
    return known[name]
