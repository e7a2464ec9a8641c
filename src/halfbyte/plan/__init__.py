"""What becomes of every tensor of a checkpoint: words and shapes to a Job."""

from halfbyte.plan.resolve import decoding, resolve, transcoding
from halfbyte.targets.plan import AS_ASKED, SKIPPED, Choice, Job

__all__ = ["AS_ASKED", "SKIPPED", "Choice", "Job", "decoding", "resolve", "transcoding"]
