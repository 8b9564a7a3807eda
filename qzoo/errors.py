"""Every exception qzoo raises on purpose.

Each one is also a builtin exception type, so that ``except ValueError`` keeps working; the common base lets an
application catch whatever the zoo refuses with one clause. Messages restate the input, name the module or field
and say what to do.
"""


class QzooError(Exception):
    """Base of all errors that qzoo raises on purpose."""


class ArgumentError(QzooError, ValueError):
    """An argument that is unknown, out of range, or does not fit the others.

    The commands print it as one line. A plain ValueError, of torch or of a mistake in qzoo, keeps its traceback.
    """


class QuantizationError(QzooError, ValueError):
    """Arguments of a quantization operator that do not fit together: shapes, types, bits."""


class MissingRangeError(QzooError, RuntimeError):
    """A quantizer was asked to quantize but holds no range (amax)."""


class NonFiniteError(QzooError, ValueError):
    """NaN or infinity where a finite statistic or range is needed."""


class CalibrationError(QzooError, RuntimeError):
    """Calibration can't give ranges: no data, or quantizers that saw none."""


class UnknownModelError(QzooError, ValueError):
    """A model, tag or scheme name that the zoo does not know."""


class CheckpointError(QzooError, ValueError):
    """A checkpoint folder that is incomplete, altered, or of another model."""


class HubError(QzooError, RuntimeError):
    """A download or an upload that failed."""


class ExportError(QzooError, RuntimeError):
    """A model that can't be written as asked in ONNX."""


class GraphError(QzooError, ValueError):
    """An ONNX file that can't be read, or is too large or too deep to judge."""


class DataError(QzooError, ValueError):
    """A data set that is not there, or not laid out as expected."""


class BrokenImageError(DataError):
    """An image that does not decode, in data that are laid out as expected."""


class DistributedError(QzooError, RuntimeError):
    """Processes of one job that can't reach each other, or data that can't be dealt out to them."""


class BenchmarkError(QzooError, RuntimeError):
    """A model that failed in the process that measures it."""


class MissingDependencyError(QzooError, ImportError):
    """An optional package is not installed; the message has the ``pip install`` that brings it."""


def one_line(text: str) -> str:
    """Escape what would move a terminal's cursor, colour its text or begin another line."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def printable(text: str) -> str:
    """Escape what would move a terminal's cursor or colour its text; ends of lines stay."""
    return "\n".join(map(one_line, text.split("\n")))


_LONGEST = 60  # characters of a text that a message quotes


def shown(text: str) -> str:
    """Quote a text of a file or a user for a message: control characters escaped, and cut where it is long."""
    return repr(text) if len(text) <= _LONGEST else f"{text[:_LONGEST]!r}..."
