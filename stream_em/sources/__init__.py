"""Where events come from: files, standard input and River's data sets, all read as a stream of chunks.

A source reads Parquet, CSV, JSON Lines or a River data set and hands out `Chunk`s of a fixed number of
events. Memory does not depend on how many events there are. Columns that are not for the model (label, event
time, weight, anything excluded) are set apart here, so that no later step can learn from a label by accident.

What cannot be read is never dropped in silence: a bad CSV cell or JSON line becomes a `Rejection` for that
event alone, and a source that is broken as a whole raises `SourceError`, which names the path.
"""

from stream_em.sources.faults import SourceError
from stream_em.sources.files import FORMATS, format_of_name, same_file
from stream_em.sources.json_lines import parse_event
from stream_em.sources.opening import STANDARD_INPUT, open_source
from stream_em.sources.pieces import Piece, Position, Reader, Rejection, Rows, grouped
from stream_em.sources.river_data import river_dataset_names
from stream_em.sources.source import Chunk, Source

__all__ = [
    "FORMATS",
    "STANDARD_INPUT",
    "Chunk",
    "Piece",
    "Position",
    "Reader",
    "Rejection",
    "Rows",
    "Source",
    "SourceError",
    "format_of_name",
    "grouped",
    "open_source",
    "parse_event",
    "river_dataset_names",
    "same_file",
]
