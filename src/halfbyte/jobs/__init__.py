"""What becomes of every tensor of a checkpoint: words and shapes to a Job."""

from halfbyte.jobs.job import AS_ASKED, SKIPPED, Choice, Job
from halfbyte.jobs.resolve import decoding, resolve, transcoding

__all__ = ["AS_ASKED", "SKIPPED", "Choice", "Job", "decoding", "resolve", "transcoding"]
