"""The trainer for real models: the reference methods put into transformers' models, trained by its loop under accelerate.

    loracle full run lora                                                           # one process, a small model built here
    accelerate launch --multi_gpu -m loracle.toy_tasks.full_scale lora --model paper    # several

| file | what it does |
|---|---|
| `settings.py` | a paper's table [full], and what the user changes, as one `Run` without unknowns |
| `small.py` | a small Llama, its tokenizer and data from what ships with Python |
| `data.py` | JSONL or hub data to token rows, prompt masked in the loss; the order of the batches |
| `hub.py` | what to say where a model or data set cannot be had |
| `engine.py` | one process, DDP or sharded base weights; what the ranks have to agree on |
| `training.py` | a run from its settings to its report |
| `loop.py` | transformers' `Trainer`, told of the loss, the order of the rows and what a step is |
| `checkpoints.py` | whole checkpoints in safetensors |
| `log.py` | what each step did, and what they add up to |
| `evaluation.py` | losses of tokens, exact match, text |
| `exports.py` | PEFT adapters or merged models |
| `memory.py` | the memory that a run will need |
| `bench.py` | speed and memory of the methods beside PEFT's LoRA |
"""
