"""A job's output as files: one edition for each kind of checkpoint that is written."""

from halfbyte.containers.container import ConfigContainer
from halfbyte.editions.edition import Edition
from halfbyte.editions.folder import FolderEdition
from halfbyte.editions.gguf import GGUFEdition
from halfbyte.jobs import Job


def edition_of(job: Job) -> Edition:
    return FolderEdition(job, job.container) if isinstance(job.container, ConfigContainer) else GGUFEdition(job)
