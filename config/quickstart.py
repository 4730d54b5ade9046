# The first run: learns to write Python's documentation, byte by byte. No download.
# Three runs of the command took 2 min 20 s to 2 min 29 s on 2 cores of an AMD EPYC with
# AVX512-BF16.

dataset = 'pydocs'  # 2.6 MB that come with Python (2.45 MB to train on); prepared by the first run

# 12 sequences * 256 bytes = 3,072 tokens per step; * 1,400 steps = 4.3 million: 1.8 epochs.
# Half the steps see the same bytes as 48 sequences of 64: nearby context is learned first
gradient_accumulation_steps = 1
batch_size = 12
block_size = 256
short_block_size = 64
short_iters = 700
max_iters = 1400

# 12 * n_layer * n_embd^2 = 1.5M parameters in the blocks; a larger model would take longer
arch = 'modern'
n_layer = 5
n_head = 2
n_embd = 160

# tuned for characters of Shakespeare and the same time
optimizer = 'muon'
muon_lr = 0.03
muon_momentum = 0.9
learning_rate = 6e-3
beta1 = 0.8
beta2 = 0.95
lr_schedule = 'linear'
warmup_iters = 5
lr_decay_iters = None  # the last step
cooldown = 0.9
min_lr = 0.0

eval_interval = 350
eval_iters = 20  # 20 * 12 sequences: 61,440 bytes of each split
log_interval = 20
always_save_checkpoint = False  # keep only the last two and the best
sample_tokens = 600
