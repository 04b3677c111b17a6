"""Documents from raw data of every kind, in pieces that many processes can read.

Inputs:
    FILE.jsonl, FILE.ndjson, FILE.json   one JSON object a line; each is a document
    FILE.parquet                         every row is a document
    FILE.pdf                             the text of its pages, one file is one document
    FILE.npy, FILE.npz                   token ids: 1-D arrays are a document, 2-D arrays a document a row
    any other file                       UTF-8 text, one file is one document
    .gz or .zst behind .jsonl, ...       the same, compressed; also behind the ending of a text file
    FOLDER                               every file below it that ends in one of FOLDER_SUFFIXES, also through links;
                                         hidden ones and our own output (*.tokenizer, *.work, *.skipped.jsonl) are left
                                         out, and a file with several names is read under the first
    GLOB                                 `*`, `?`, `[...]` and `**`; every file it matches, whatever its ending, and
                                         every folder, as FOLDER
    python-stdlib                        the .py files of the running interpreter's standard library, tests left out
    hf://ORG/NAME[/CONFIG][:SPLIT]       a Hugging Face dataset by name, streamed; every row is a document
    hf:FOLDER[:SPLIT]                    one on disk: saved by `save_to_disk`, or a folder of data files
    -                                    standard input, as lines of JSON or as one text

The text of a record or row is its field `text_key`, or a template filled with several fields.

Files are read in the order of a hash of their names (relative to the input), whatever the order of the inputs or of the
file system, so that a contiguous part of the documents is a fair sample of all. Documents of one file keep their order.
Line ends and all other characters are kept as they are; only a byte order mark at the start of a file is dropped.
"""

from megaslm.data.sources.files import PYTHON_STDLIB
from megaslm.data.sources.records import EMPTY, LISTED_FAULTS, Document, Fault, Piece, PieceContent, SourceFile, Unit
from megaslm.data.sources.source import TextSource

__all__ = [
    "EMPTY",
    "LISTED_FAULTS",
    "PYTHON_STDLIB",
    "Document",
    "Fault",
    "Piece",
    "PieceContent",
    "SourceFile",
    "TextSource",
    "Unit",
]
