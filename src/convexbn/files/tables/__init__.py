"""Tables of the user's own, for the command line: CSV, Parquet and NPZ.

`read_table` returns a `Dataset`: a finite float64 matrix with the names of its columns and, on request, a target. A
file is either read exactly or refused with a `TableError`, one sentence that names the file, the place, the cause and
the remedy: no cell is guessed, skipped or filled in, and no pickle is loaded. A `Reading` that is not strict leaves
text as text and missing cells missing, in a `Table`.
"""

from convexbn.files.tables.read import read_table
from convexbn.files.tables.table import Reading, TableError

__all__ = ["Reading", "TableError", "read_table"]
