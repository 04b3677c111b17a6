"""PDF files: the text of all pages of a file is one document."""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager

from megaslm.data.sources.records import Piece, PieceContent, ReadOptions, SourceFile, open_file

# What pypdf says of oddities that cost no text: it has mended them, or they are of fonts' widths, images and the like.
# Whatever else it says means that a part of the file was left out.
HARMLESS = re.compile(
    r"pypdf\.generic\._(font|image)|found$|repaired|wrong pointing|whitespace|startxref (pointer\(|on same)|"
    r"Negative startxref|EOF marker|pdf header|zero-indexed|[Rr]ebuild|/Prev=0|Object Streams|/Catalog|Root |/ID entry|"
    r"FloatObject|NameObject|[Mm]issing EOD|Ascii85|trailing newline|Multiple definitions|fontTools|RC4|SASLprep|"
    r"/Perms|/EncryptMetadata"
)


def plan(file: SourceFile, options: ReadOptions, unit_bytes: int) -> Iterator[Piece]:
    """The whole file."""
    yield Piece(file, "pdf", size=file.size, weight=file.size)


def read(piece: Piece, options: ReadOptions) -> PieceContent:
    """The text of the pages, a line end between them; a fault where a part of it cannot be read."""
    import pypdf

    content = PieceContent(numbered=False)
    if piece.file.size > options.max_document_bytes:
        content.add_fault(options.too_large(piece.file.size))
        return content
    with open_file(piece.file) as stream, _losses() as losses:
        try:
            reader = pypdf.PdfReader(stream)
            if reader.is_encrypted and not reader.decrypt(""):
                content.add_fault("the PDF is encrypted; decrypt it first (qpdf --decrypt), or leave it out")
                return content
            text = "\n".join(page.extract_text() for page in reader.pages)
        except pypdf.errors.DependencyError as error:
            content.add_fault(f"the PDF is encrypted in a way that needs more software: {error}")
            return content
        # A damaged file makes it fail in any way: KeyError, RecursionError, its own errors ...
        except Exception as error:
            content.add_fault(f"the PDF cannot be read ({type(error).__name__}: {error}); repair it, or leave it out")
            return content
    if losses:
        content.add_fault(f"the PDF can be read in parts only ({losses[0]}); repair it, or leave it out")
    elif not text.strip():
        content.add_fault("the PDF has no text, only images perhaps; run OCR on it first, or leave it out")
    else:
        # What a faulty character map gives: halves of characters, put together where both are there.
        content.add_text(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"), options)
    return content


@contextmanager
def _losses() -> Iterator[list[str]]:
    """The messages of pypdf that are not harmless; none of them is logged."""
    losses: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if not HARMLESS.search(f"{record.name}: {record.getMessage()}"):
                losses.append(record.getMessage())

    logger, collector = logging.getLogger("pypdf"), Collector()
    before = logger.level, logger.propagate
    logger.addHandler(collector)
    logger.setLevel(logging.WARNING)
    logger.propagate = False
    try:
        yield losses
    finally:
        logger.level, logger.propagate = before
        logger.removeHandler(collector)
