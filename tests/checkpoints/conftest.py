"""The checkpoints that the tests of this room read and break."""

from tests.builders.checkpoints import copied, seeing, sharded, single

__all__ = ["copied", "seeing", "sharded", "single"]
