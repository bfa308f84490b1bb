"""One model on several GPUs: the loop of `lib.training`, with weights or data spread over processes.

    # train.py, started by: torchrun --nproc-per-node=8 train.py   (or python train.py: one process)
    history = fit_distributed(model, loss, batch, steps=20_000, optimizer=Optimizer(), checkpoint=folder)

Every process (rank) runs the same script and holds one GPU, or is one CPU process of the gloo backend. The
loss curve is that of `lib.training.fit` up to the rounding of sums, whatever the number of ranks.

Why torch's FSDP2 and not Accelerate: it came with torch, the model stays the plain module whose taps the book
reads, and the loop stays the loop. Accelerate would wrap model, loop and checkpoint to call the same FSDP2.
"""

from lib.distributed.loop import fit_distributed
from lib.distributed.states import load_trained

__all__ = ["fit_distributed", "load_trained"]
