"""What the command line says about a server, checked before a model is loaded."""

import dataclasses
import math

from derta_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Serving:
    """Where and how a model is served; without a `name` under its own, without a `context` (tokens) in a usual one.

    `queue` requests may wait beside those that have a slot; what is there when the server stops has `grace` seconds.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    token: str | None = None
    name: str | None = None
    context: int | None = None
    queue: int = 128
    grace: float = 30.0

    def __post_init__(self) -> None:
        if not 0 <= self.port < 2**16:
            raise UserError(f"--port must be 0 to 65535 (got {self.port})")
        if self.queue < 0:
            raise UserError(f"--queue must not be negative (got {self.queue})")
        if not (0 <= self.grace < math.inf):
            raise UserError(f"--grace must be a number of seconds (got {self.grace})")
        if self.context is not None and self.context < 2:
            raise UserError(f"--context must hold a prompt and an answer (got {self.context})")
        if self.token is not None and not (self.token.isascii() and self.token.isprintable() and self.token.split()):
            raise UserError("the token must be of printable ASCII characters, and not empty")
