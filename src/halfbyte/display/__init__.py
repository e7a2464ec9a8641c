"""What the command line shows: tables and sentences."""

from halfbyte.display.answers import answered, scored
from halfbyte.display.checkpoints import budget, cached, compared, inspected, worst
from halfbyte.display.measurements import blamed, by_text, demonstrated, evaluated, needles, states
from halfbyte.display.sizing import UNCHECKED, advised, device, devices
from halfbyte.display.speeds import timed
from halfbyte.display.tables import table, with_error, without_prefix
from halfbyte.display.talking import drawn, memory, opened, parting, replied, side_by_side, speeds

__all__ = [
    "UNCHECKED",
    "advised",
    "answered",
    "blamed",
    "budget",
    "by_text",
    "cached",
    "compared",
    "demonstrated",
    "device",
    "devices",
    "drawn",
    "evaluated",
    "inspected",
    "memory",
    "needles",
    "opened",
    "parting",
    "replied",
    "scored",
    "side_by_side",
    "speeds",
    "states",
    "table",
    "timed",
    "with_error",
    "without_prefix",
    "worst",
]
