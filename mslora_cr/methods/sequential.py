"""One bank that continues to train from task to task: the lower bound, which forgets."""

from mslora_cr.methods.base import Method


class Sequential(Method):
    """Loss: cross entropy; bank t starts as bank t-1. Stage k answers every task with bank k.

    Source: plain fine-tuning along the stream, the baseline of McCloskey and Cohen, "Catastrophic Interference in
    Connectionist Networks", Psychology of Learning and Motivation 24, 1989, and of every comparison since.
    """

    name = "sequential"
    init_from_previous = True
