"""What was found of each weight, in a file: a second budget reads it, and a run that was killed goes on from it."""

import json
from collections.abc import Mapping
from pathlib import Path

from halfbyte.errors import BadRequest
from halfbyte.files import exists

Losses = Mapping[str, float]
"""Loss by the name of a scheme."""


class Ledger:
    """Losses by weight and scheme: a first line says of what, then one line follows another."""

    def __init__(self, path: Path, identity: str):
        """Raises BadRequest for a file of something else."""
        self.path, self._identity = path, identity
        self.losses: dict[str, dict[str, float]] = {}
        self._whole = 0
        """Bytes up to the end of the last whole line: a killed run may have left a part of one."""
        if exists(path):
            self._read()

    def _read(self) -> None:
        try:
            lines = self.path.read_bytes().splitlines(keepends=True)
            records = [json.loads(line) for line in lines if line.endswith(b"\n")]
            of = records[0]["of"] if records else self._identity
            for record in records[1:]:
                losses = {str(name): float(loss) for name, loss in record["losses"].items()}
                self.losses.setdefault(record["weight"], {}).update(losses)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise BadRequest(f"{self.path} is no file of sensitivities; name another") from None
        if of != self._identity:
            raise BadRequest(
                f"{self.path} is of another model, method, calibration or kind of sensitivity; name another "
                "file of sensitivities, or delete it"
            )
        self._whole = sum(len(line) for line in lines if line.endswith(b"\n"))

    def add(self, losses: Mapping[str, Losses]) -> None:
        """Note losses by weight."""
        if not losses:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        records = [{"weight": weight, "losses": dict(by_scheme)} for weight, by_scheme in losses.items()]
        records = records if self._whole else [{"of": self._identity}, *records]
        with open(self.path, "r+b" if self._whole else "wb") as file:
            file.truncate(self._whole)
            file.seek(self._whole)
            file.write("".join(f"{json.dumps(record)}\n" for record in records).encode())
            self._whole = file.tell()
        for weight, by_scheme in losses.items():
            self.losses.setdefault(weight, {}).update(by_scheme)
