# GPT-2 124M's blocks in the modern architecture with Muon, on one node with 8 GPUs of 80 GB: 85M
# parameters in the blocks, 39M each in embedding and head. 10 billion tokens instead of
# train_gpt2's 295: Muon needs about half of AdamW's (Liu et al. 2025), and most of the 295 buy
# little. Not run yet.
# Prepare the text first: data/openwebtext/prepare.py
# $ torchrun --standalone --nproc_per_node=8 train.py train_gpt2_modern

dataset = 'openwebtext'
wandb_log = False  # --wandb_log follows the run in a browser
wandb_project = 'owt'
wandb_run_name = 'gpt2-124M-modern'

arch = 'modern'
n_layer = 12
n_head = 6  # heads of 128, as NanoChat has them: fewer, wider products for the same work
n_embd = 768

# 32 sequences * 1,024 tokens * 16 micro-batches = 524,288 tokens per step: below about a million,
# Muon loses little by a larger batch (Shah et al. 2025), and a step is long enough for 8 GPUs
batch_size = 32  # 16 with 40 GB, and then 32 micro-batches
block_size = 1024
gradient_accumulation_steps = 2 * 8  # 2 on each of 8 GPUs

# 19,000 steps * 524,288 tokens = 10.0 billion tokens, a pass over OpenWebText's 9.0 billion and a
# bit: 80 tokens per parameter, four times Chinchilla's 20 (Hoffmann et al. 2022)
max_iters = 19000
lr_decay_iters = None  # until the last step

optimizer = 'muon'
muon_lr = 0.02  # Jordan's for this size; a matrix's update has the same size at every width
muon_momentum = 0.95
# NanoChat's 0.004 for the head at this width; its 0.2 for the embedding, too, which starts with a
# spread of 1 there and of 0.02 here, and whose scale the norm after it takes away
learning_rate = 4e-3
beta1 = 0.8  # NanoChat's
beta2 = 0.95
weight_decay = 0.1  # of the blocks: Muon needs some over long runs (Liu et al. 2025)

# constant and then straight to zero: better than the cosine to a tenth for the same steps
# (Bergsma et al. 2025), and the constant part can be prolonged (Haegele et al. 2024)
lr_schedule = 'linear'
warmup_iters = 100  # Muon's steps have a fixed size from the first on, so a short rise is enough
cooldown = 0.5
min_lr = 0.0

eval_interval = 1000
eval_iters = 80  # 80 * 32 sequences = 2.6 million tokens: the loss is good to about 0.01
log_interval = 10
always_save_checkpoint = False  # the best and the last two
