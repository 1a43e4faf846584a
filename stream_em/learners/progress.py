"""A progress bar for batch EM."""

from __future__ import annotations

from collections.abc import Callable


class Progress:
    """A Rich progress bar, or nothing.

    Raises
    ------
    ImportError
        When it is to be shown and Rich is not installed.

    """

    def __init__(self, shown: bool, total: int) -> None:
        self._shown, self._total = shown, total

    def __enter__(self) -> Callable[[str], None]:
        if not self._shown:
            return lambda text: None
        try:
            from rich.progress import Progress
        except ModuleNotFoundError as error:
            raise ImportError(
                "progress=True needs rich: pip install 'stream-em[cli]', or leave progress out"
            ) from error

        self._progress = Progress()
        self._progress.start()
        task = self._progress.add_task("EM", total=self._total)
        return lambda text: self._progress.update(task, advance=1, description=text)

    def __exit__(self, *error: object) -> None:
        if self._shown:
            self._progress.stop()
