"""Many devices: who this process is, how a model is laid over all of them, and checkpoints that fit any number of them.

`World` is the process's place, `wrap` lays a model out (ddp, fsdp2, hsdp, tensor parallel; all in place, the model stays a
`Qwen`), `gradient_sync`, `reduce_gradients` and `gradient_norm` belong around a backward pass, `save_sharded` and
`load_sharded` write and read what each process holds, `fill_slices` reads a model after it was laid out. Context
parallelism is refused: see `World.current`.
"""

from qwenkit.train.parallel.layout import gradient_sync, reduce_gradients, reshard, wrap
from qwenkit.train.parallel.sharded import ShardedFolder, load_sharded, save_sharded
from qwenkit.train.parallel.slices import fill_slices
from qwenkit.train.parallel.world import World, gradient_norm, local, sharded_like

__all__ = [
    "ShardedFolder",
    "World",
    "fill_slices",
    "gradient_norm",
    "gradient_sync",
    "load_sharded",
    "local",
    "reduce_gradients",
    "reshard",
    "save_sharded",
    "sharded_like",
    "wrap",
]
