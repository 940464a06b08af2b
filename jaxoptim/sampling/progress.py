"""A progress bar of a run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def bar(total: int, start: int, shown: bool) -> Iterator[Callable[[int], None]]:
    """Yield a function to call with the number of steps made; it shows them with tqdm, or does nothing.

    Raises:
        ``ImportError`` without tqdm if ``shown``.
    """
    if not shown:
        yield lambda step: None
        return
    try:
        import tqdm
    except ImportError as error:
        raise ImportError(
            "A progress bar needs tqdm: pip install tqdm, or pip install 'jaxoptim[sampling]'."
        ) from error
    with tqdm.tqdm(total=total, initial=start, unit="step", desc="sampling") as shown_bar:

        def show(step: int) -> None:
            shown_bar.update(step - shown_bar.n)

        yield show
