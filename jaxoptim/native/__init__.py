"""Functions of single numbers over large arrays, on CPUs by one pass over memory in C; it knows no optimizer."""

from jaxoptim.native.barrier import after as after
from jaxoptim.native.compiler import CannotCompile as CannotCompile
from jaxoptim.native.elements import Unsupported as Unsupported
from jaxoptim.native.one_pass import one_pass as one_pass
from jaxoptim.native.setting import config as config
from jaxoptim.native.setting import is_native as is_native
