# Reaches the loss that nanoGPT prints after the 2,000 steps of its laptop recipe, 1.8857. Two runs
# of the command took 6.5 and 6.2 s on 2 cores of an AMD EPYC with AVX512-BF16, a third of it for
# startup, evaluation and plot.
# $ python train.py config/speedrun_laptop.py

dataset = 'shakespeare_char'
eval_interval = None  # only at the end
eval_iters = None  # the whole validation split, 111,540 characters
eval_train = False
log_interval = 10
always_save_checkpoint = False
sample_tokens = 100

# 32 sequences * 64 characters = 2,048 tokens per step; * 100 steps = a fifth of the text. The first
# steps use 64 sequences of 32: cheaper attention, and a loss 0.01 lower
gradient_accumulation_steps = 1
batch_size = 32
block_size = 64
short_block_size = 32
short_iters = 63
max_iters = 100
lr_decay_iters = None  # the last step

# 12 * n_layer * n_embd^2 = 0.9M parameters in the blocks: few wide layers, since overhead
# dominates each step. 4 layers of 128 took a third longer to the same loss
arch = 'modern'
n_layer = 2
n_head = 3
n_embd = 192

# a hundred steps need twice the learning rates of a thousand, and no warmup, because each block
# starts as the identity
optimizer = 'muon'
muon_lr = 0.06
muon_momentum = 0.85  # with 0.9 or 0.8 the loss was 0.01 higher
learning_rate = 1.2e-2
beta1 = 0.8
beta2 = 0.95
lr_schedule = 'linear'
warmup_iters = 0
cooldown = 0.5
min_lr = 0.0
