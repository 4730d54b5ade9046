# The modern architecture at the size of GPT-2 124M, with Muon, on one node with 8 GPUs of 80 GB. It
# has 163M parameters: 85M in the blocks, 39M in the head, and 39M in an embedding of its own, where
# GPT-2 uses the head. Without the embedding, which is only looked up, these are 124M, as train.py
# prints. 10 billion tokens instead of train_gpt2's 295 billion: Muon needs about half as many as
# AdamW (Liu et al. 2025), and most of the 295 billion improve the loss little. Not run yet. Prepare
# the text first: data/openwebtext/prepare.py
# $ torchrun --standalone --nproc_per_node=8 train.py train_gpt2_modern

dataset = 'openwebtext'
wandb_log = False  # --wandb_log shows the run in a browser
wandb_project = 'owt'
wandb_run_name = 'gpt2-124M-modern'

arch = 'modern'
n_layer = 12
n_head = 6  # head size 128, as in NanoChat: fewer, larger matrix products
n_embd = 768

# 32 sequences * 1,024 tokens * 16 micro-batches = 524,288 tokens per step. Up to about a
# million, Muon loses little with a larger batch (Shah et al. 2025), and it keeps 8 GPUs busy
batch_size = 32  # with 40 GB: 16, and 32 micro-batches
block_size = 1024
gradient_accumulation_steps = 2 * 8  # 2 on each of 8 GPUs

# 19,000 steps * 524,288 tokens = 10.0 billion tokens, 1.1 epochs of OpenWebText's 9.0 billion:
# 80 tokens for each of the 124M parameters, four times Chinchilla's 20 (Hoffmann et al. 2022)
max_iters = 19000
lr_decay_iters = None  # the last step

optimizer = 'muon'
muon_lr = 0.02  # Jordan's for this size; the size of Muon's updates does not depend on the width
muon_momentum = 0.95
# NanoChat's 0.004 for the head at this width. It corresponds to NanoChat's 0.2 for the
# embedding, too: the embedding's initial standard deviation is 1 there and 0.02 here, and the
# norm after it removes the scale
learning_rate = 4e-3
beta1 = 0.8  # NanoChat's
beta2 = 0.95
weight_decay = 0.1  # of the blocks: Muon needs some over long runs (Liu et al. 2025)

# constant, then linear to zero: better than a cosine to a tenth in the same number of steps
# (Bergsma et al. 2025), and the constant part can be extended (Haegele et al. 2024)
lr_schedule = 'linear'
warmup_iters = 100  # Muon's updates have a fixed size from the start, so a short warmup is enough
cooldown = 0.5
min_lr = 0.0

eval_interval = 1000
eval_iters = 80  # 80 * 32 sequences = 2.6 million tokens: the error of the loss is about 0.01
log_interval = 10
always_save_checkpoint = False  # keep only the last two and the best
