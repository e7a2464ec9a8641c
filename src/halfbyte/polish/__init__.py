"""The refinement `polish`, a stage of the whole model: codes stay, and all that may change beside them is tuned."""

from halfbyte.polish.stage import polish

__all__ = ["polish"]
