"""Speed and peak memory of the methods beside PEFT's LoRA on a small Llama on the CPU: results/full_scale.json.

On a GPU: `loracle full bench --shape 4096,11008,32,32,32000 --sequence 1024 --rows 1`.
"""

import dataclasses

from _results import promise, write

from loracle.toy_tasks.full_scale.bench import measure, runs

SHAPE = (256, 688, 4, 4, 2048)
AT_LEAST = 0.95  # of the speed of PEFT's LoRA

found = measure(runs(None, rank=8, precision="float32", sequence=128, rows=4, cpu=True), SHAPE, steps=3, rounds=15, cpu=True)
lora = next(one for one in found.methods if one.method == "lora")
for one in found.methods:
    print(f"{one.method}: speed {one.relative_speed:.3f}, memory {one.relative_memory:.3f}, start {one.init_seconds:.2f} s")
says = "full scale: the time of a step with our LoRA, in those of PEFT's LoRA"
write("full_scale", {"promises": [promise(says, 1 / lora.relative_speed, 1 / AT_LEAST)], **dataclasses.asdict(found)})
