"""
How a model lies on disk: ours, and those of others in both directions.

A run's folder holds checkpoints/step-00002000/ and so on, each complete in itself:

    model.safetensors       parameters, float32, under model.py's names
    optimizer.safetensors   the optimizer's state, as <parameter>.<key>
    tokenizer.json          the vocabulary, so that sampling never needs data/
    state.json              step, losses, the model's shape, the settings
    adapter/                of a run with lora_rank, as peft loads it; model.safetensors is its base
    manifest.json           sha256 of every file above, written last

A sharded run writes its tensors in parts, model-00001-of-00004.safetensors and so on, the rows that
each rank holds; together they are the same parameters, and any number of processes can resume.
No pickle anywhere: of nanoGPT's only tensors are unpickled.
"""
