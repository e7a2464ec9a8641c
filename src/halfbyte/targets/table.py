"""A job's output as files: one edition for each kind of checkpoint that is written."""

from halfbyte.containers.container import ConfigContainer
from halfbyte.targets.gguf.writer import GGUFEdition
from halfbyte.targets.hf.writer import FolderEdition
from halfbyte.targets.plan import Job
from halfbyte.targets.target import Edition


def edition_of(job: Job) -> Edition:
    return FolderEdition(job, job.container) if isinstance(job.container, ConfigContainer) else GGUFEdition(job)
