"""What several test files share."""

import functools
import gc
import json
import warnings

import pytest

from loracle.toy_tasks import experiment


@pytest.fixture(scope="session")
def quick_run(tmp_path_factory):
    """The results of an experiment's quick run, by slug; each is run once."""

    @functools.cache
    def run(slug: str) -> experiment.Results:
        task, config = experiment.load(slug, quick=True)
        return experiment.run(task, config, seeds=range(3), out=tmp_path_factory.mktemp(slug), quick=True)

    return run


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory):
    """A folder with a random Llama of 15,000 parameters and its tokenizer, and beside it `data.jsonl` with sums to learn."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from loracle.toy_tasks.full_scale import small

    folder = tmp_path_factory.mktemp("tiny") / "llama"
    examples = [
        {"instruction": f"{a} + {b} = ?", "response": f"{a} and {b} make {a + b}. #### {a + b}"} for a in range(8) for b in range(8)
    ]
    (folder.parent / "data.jsonl").write_text("".join(json.dumps(example) + "\n" for example in examples))
    tokenizer = small.train_tokenizer("".join(example["instruction"] + example["response"] for example in examples))
    with torch.random.fork_rng():
        torch.manual_seed(3)
        sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}
        config = transformers.LlamaConfig(
            vocab_size=len(tokenizer), max_position_embeddings=128, bos_token_id=1, eos_token_id=2, pad_token_id=0, **sizes
        )
        transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    gc.freeze()  # every run collects garbage, and need not look for it in what was imported
    return folder


@pytest.fixture(scope="session")
def tensors_in():
    """What a checkpoint holds by name, whole, whatever the number of processes that wrote it; read by torch in this one."""
    torch, dcp = pytest.importorskip("torch"), pytest.importorskip("torch.distributed.checkpoint")

    def read(folder):
        contents = dcp.HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
        found = {name: torch.full(content.size, 77, dtype=content.properties.dtype) for name, content in contents.items()}
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # that there is one process
            dcp.load(found, storage_reader=dcp.HuggingFaceStorageReader(str(folder)))
        return found

    return read
