"""How the processes of one run share a stage: alone, or with the data split among them."""

from gendistill.training.parallel.base import Parallel
from gendistill.training.parallel.choose import choose_parallel, connect
from gendistill.training.parallel.ddp import DataParallel
from gendistill.training.parallel.fsdp2 import FullySharded
from gendistill.training.parallel.peers import Situation
from gendistill.training.parallel.single import Single

__all__ = [
    "DataParallel",
    "FullySharded",
    "Parallel",
    "Single",
    "Situation",
    "choose_parallel",
    "connect",
]
