"""The methods by the name that `method:` chooses."""

from mslora_cr.config.schema import MethodName, StreamConfig
from mslora_cr.methods.base import Method
from mslora_cr.methods.each import Each
from mslora_cr.methods.ewc import Ewc
from mslora_cr.methods.incremental import Incremental
from mslora_cr.methods.joint import Joint
from mslora_cr.methods.lwf import Lwf
from mslora_cr.methods.moe_lora import MoeLora
from mslora_cr.methods.mslora_cr import MsloraCr
from mslora_cr.methods.olora import Olora
from mslora_cr.methods.replay import Replay
from mslora_cr.methods.sequential import Sequential
from mslora_cr.methods.zero_shot import ZeroShot

METHODS: dict[MethodName, Method] = {
    "zero_shot": ZeroShot(),
    "each": Each(),
    "sequential": Sequential(),
    "incremental": Incremental(),
    "mslora_cr": MsloraCr(),
    "olora": Olora(),
    "ewc": Ewc(),
    "lwf": Lwf(),
    "replay": Replay(),
    "moe_lora": MoeLora(),
    "joint": Joint(),
}


def needs_task(config: StreamConfig) -> bool:
    """Whether it matters which task a question belongs to: whether tasks are answered by different banks."""
    method, last = METHODS[config.method], len(config.tasks)
    return len({tuple(method.banks(task, last, "prefix")) for task in range(1, last + 1)}) > 1
