# The first run: about three minutes on two CPU cores, nothing to download.
# Learns to write Python's own documentation, byte by byte.

dataset = 'pydocs'  # 2.4 million bytes that come with every Python; prepared when missing

# 8 sequences * 256 bytes = 2,048 tokens per step; * 1,600 steps = 3.3 million: 1.3 passes.
# Twice the batch with half the steps ended higher: 1.72 at best, against 1.61
gradient_accumulation_steps = 1
batch_size = 8
block_size = 256
max_iters = 1600

# 12 * n_layer * n_embd^2 = 1.8M parameters in the blocks: the largest that learns in the time
n_layer = 4
n_head = 6
n_embd = 192

# few steps want a high rate that ends at zero; 3e-3 and 5e-3 ended at 1.62 and 1.73
learning_rate = 2e-3
lr_schedule = 'linear'
warmup_iters = 40
lr_decay_iters = None  # until the last step
cooldown = 0.6
min_lr = 0.0
beta2 = 0.99

eval_interval = 400
eval_iters = 20  # 20 * 8 sequences: 40,960 bytes of each split, a second's work
log_interval = 20
always_save_checkpoint = False  # the last two and the best are enough
sample_tokens = 600
