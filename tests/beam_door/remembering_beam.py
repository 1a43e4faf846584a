"""Beam looks into the same classes and parses the same options for each transform: half of the time of small pipelines.

Within `remembering` it keeps what it found. Workers that an engine starts are Beam as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import pytest
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.transforms import core

Arguments = tuple[list[str], list[Any]]


@contextmanager
def remembering() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(core, "get_function_args_defaults", remembering_arguments(core.get_function_args_defaults))
        patch.setattr(PipelineOptions, "view_as", remembering_views(PipelineOptions.view_as))
        yield


def remembering_arguments(look: Callable[[Any], Arguments]) -> Callable[[Any], Arguments]:
    found: dict[Any, Arguments] = {}

    def remembered(function: Any) -> Arguments:
        # A method of any instance has the arguments of its function, but for the first.
        known = getattr(function, "__func__", function)
        key = known, known is function
        if key not in found:
            found[key] = look(function)
        names, defaults = found[key]
        return list(names), list(defaults)

    return remembered


def remembering_views(parse: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    parsed: dict[Any, Any] = {}

    def remembered(options: Any, kind: Any) -> Any:
        key = kind, None if options._flags is None else tuple(options._flags)
        if key not in parsed:
            parsed[key] = deepcopy(parse(PipelineOptions(options._flags), kind)._visible_options)
        view = object.__new__(kind)
        view._flags, view._visible_options = options._flags, deepcopy(parsed[key])
        for name, value in vars(view._visible_options).items():
            options._all_options.setdefault(name, value)
        view._all_options = options._all_options
        return view

    return remembered
