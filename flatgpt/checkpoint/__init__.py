"""
Model formats on disk: our own checkpoints; import and export of external ones.

A run directory has checkpoints/step-00002000/ and so on, each complete in itself:

    model.safetensors       parameters, float32, under model.py's names
    optimizer.safetensors   the optimizer's state, as <parameter>.<key>
    tokenizer.json          the tokenizer, so that sampling does not need data/
    state.json              step, losses, the model's shape, the settings
    adapter/                of a run with lora_rank, as peft loads it; model.safetensors is its base
    manifest.json           sha256 of every file above, written last

A sharded run writes its tensors in parts, model-00001-of-00004.safetensors and so on, with the rows
of each rank. Together they are the same parameters, and any number of processes can resume.
Nothing is stored as pickle. From nanoGPT's pickles only tensors and plain values are read.
"""
