# The first half of rl_arithmetic: a small model learns from solved sums, until it is right about
# half of the time.
# $ python train.py sft_arithmetic --out_dir=out/arithmetic
# $ python train.py rl_arithmetic --init_from=out/arithmetic

objective = 'sft'
dataset = 'arithmetic'  # prepared by the first run
arch = 'modern'
n_layer = 3
n_head = 3
n_embd = 192

# 16 sequences * 128 tokens, about 11 sums each
batch_size = 16
gradient_accumulation_steps = 1
block_size = 128
mask_documents = True
max_iters = 500
lr_decay_iters = None  # the last step

optimizer = 'muon'
muon_lr = 0.02
learning_rate = 4e-3
weight_decay = 0.0
lr_schedule = 'linear'
cooldown = 0.5
min_lr = 0.0
warmup_iters = 5

eval_interval = 250
eval_iters = None
eval_train = False
log_interval = 20
always_save_checkpoint = False
sample_tokens = 16
