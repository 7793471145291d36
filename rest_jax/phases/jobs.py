"""Independent jobs that share the work of a Grow step: job 2 of 8 makes the second eighth of its shards.

Floor 6. `SHARD = "2/8"` says which job a command is. It is no part of any identity: a shard has the same
bytes whoever makes it. Several jobs may work in one run folder at a time, on one machine or on several that
see the folder, since they write different files:

- a job writes its own shards and their records, and looks at no other job's;
- IDENTITY.json is claimed by the jobs in turn (`files.turn`): the first writes it, the others compare;
- config.gin, ledger.jsonl and the seal are written by a whole run alone, which comes after the jobs and
  makes what they left; metrics.jsonl gets its lines from training, which no job does.
"""

from __future__ import annotations

import dataclasses
import re

from rest_jax import errors


@dataclasses.dataclass(frozen=True)
class Job:
    """One of several jobs that share the shards of a step.

    Attributes:
      number: which one, from 1.
      count: how many there are.
    """

    number: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Job:
        """Reads "2/8".

        Raises:
          ConfigError: it does not name a job.
        """
        match = re.fullmatch(r"([0-9]+)/([0-9]+)", text)
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            raise errors.ConfigError(
                f"{text!r} names no job",
                where="SHARD",
                remedy='Write SHARD = "2/8" for job 2 of 8, and None for a whole run',
            )
        return cls(int(match[1]), int(match[2]))

    def share(self, parts: int) -> range:
        """This job's part of `parts` shards: contiguous, and with those of the other jobs the whole.

        Where there are fewer shards than jobs it may be empty.
        """
        return range(parts * (self.number - 1) // self.count, parts * self.number // self.count)

    @property
    def address(self) -> tuple[int, int]:
        """(number, count), for the lock."""
        return self.number, self.count

    def __str__(self) -> str:
        return f"job {self.number} of {self.count}"


def what_is_left(job: Job, made: int, left: int, total: int, verb: str) -> str:
    """What a job says when it is done.

    Args:
      job: which one it was.
      made: shards of its share.
      left: shards of the step that are not committed yet, by whichever job.
      total: shards of the step.
      verb: which makes the step.
    """
    done = f"{job}: its {made} of {total} shards are committed"
    if left:
        return f"{done}, {left} others are not yet; `rest-jax {verb}` without SHARD makes them and seals"
    return f"{done}, and so are all others; `rest-jax {verb}` without SHARD verifies and seals"
