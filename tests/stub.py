"""The stub beside ``jaxoptim/optim/classes.py``, for editors and type checkers: ``python tests/stub.py`` writes it."""

import inspect
import textwrap
from pathlib import Path
from typing import Any

from jaxoptim.optim import classes

PATH = Path(classes.__file__).with_suffix(".pyi")
CLASSES = [cls for cls in vars(classes).values() if getattr(cls, "__module__", None) == classes.__name__]
HEAD = '''"""The signatures of the classes in classes.py, written by ``python tests/stub.py``."""

# fmt: off
from typing import Any

from jax.sharding import Mesh
from optax import GradientTransformation

'''


def stub() -> str:
    """The text of the stub."""
    names = dict.fromkeys(("Groups", "Number", "Selectors"), "jaxoptim.optim.optimizer")
    names |= {base.__name__: base.__module__ for cls in CLASSES for base in cls.__bases__}
    imports = [
        f"from {module} import {', '.join(sorted(name for name in names if names[name] == module))}\n"
        for module in sorted(set(names.values()))
    ]
    return HEAD + "".join(imports) + "".join(map(_class, CLASSES))


def _class(cls: Any) -> str:
    """A class with the signature of its constructor, which is broken between its parameters only."""
    bases = ", ".join(base.__name__ for base in cls.__bases__)
    _, *parameters = inspect.signature(cls.__init__).parameters.values()
    shown = [_shown(x).replace(" ", "\xa0") for x in parameters]
    shown.insert(next(i for i, x in enumerate(parameters) if x.kind is x.KEYWORD_ONLY), "*")
    text = f"def\xa0__init__(self, {', '.join(shown)})\xa0->\xa0None:\xa0..."
    lines = textwrap.fill(text, 120, initial_indent=" " * 4, subsequent_indent=" " * 8)
    return f"\nclass {cls.__name__}({bases}):\n{lines}\n".replace("\xa0", " ")


def _shown(parameter: inspect.Parameter) -> str:
    default = "" if parameter.default is parameter.empty else f" = {parameter.default!r}"
    return f"{parameter.name}: {parameter.annotation}{default}"


if __name__ == "__main__":
    PATH.write_text(stub())
