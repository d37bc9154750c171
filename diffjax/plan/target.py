"""Where a job is to run: devices that are here, or a number of devices of a kind that need not be."""

from dataclasses import dataclass
from typing import Any, Self

import jax

from diffjax.parallel import devices, sharding, targets
from diffjax.plan import rates
from diffjax.utils.errors import UserError


@dataclass(frozen=True)
class Target:
    """`count` devices of a kind (None: of what jax uses here), over which parameters are split in the way `shard`:
    those of SD3.5's transformer in drawing, the whole state in training.
    """

    kind: str | None = None
    count: int = 1
    shard: str | None = None

    @classmethod
    def parse(cls, device: str | None, shard: str | None = None) -> Self:
        """Of words such as `h100` or `v5e-8`. Raises `UserError` for a kind or a number that is none."""
        kind, dash, count = (device or "").partition("-")
        if dash and not (count.isdecimal() and int(count)):
            raise UserError(f"--device {device}: give a kind and a number of devices, as v5e-8")
        found = cls(kind or None, int(count or 1), shard)
        if found.count > 1 and kind not in rates.NAMED:
            raise UserError(f"--device {device}: only of {', '.join(rates.NAMED)} can several be planned for")
        if shard:
            sharding.check(shard, found.count)
        return found

    @property
    def is_here(self) -> bool:
        """Whether it is what jax computes on."""
        return self.kind not in rates.NAMED

    @property
    def platform(self) -> str:
        """What its programs are lowered for: "cpu", "cuda" or "tpu"."""
        if self.kind in targets.TARGETS:
            return targets.of(str(self.kind)).platform
        here = "gpu" if self.kind in rates.NAMED else self.kind or jax.default_backend()
        return "cuda" if here == "gpu" else here

    @property
    def name(self) -> str:
        """Such as `8 V5E` or `this CPU`."""
        if self.is_here:
            return rates.of_device(self.kind)[0]
        return f"{self.count if self.count > 1 else 'one'} {str(self.kind).upper()}"

    def devices(self) -> list[Any] | None:
        """To compile for; None for the one that jax computes on. Raises `UserError` where nothing compiles for it."""
        if self.is_here:
            return None
        if self.kind not in targets.TARGETS:
            raise UserError(
                f"nothing here compiles for {self.kind}: leave --compile out, or take {', '.join(targets.TARGETS)}"
            )
        return devices.absent(str(self.kind), self.count)
