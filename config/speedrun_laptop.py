# The loss that nanoGPT prints after the 2,000 steps of its recipe for a laptop, 1.8857, in the
# time a kettle needs to notice; a third of it is Python starting, and the evaluation and picture
# $ python train.py config/speedrun_laptop.py

dataset = 'shakespeare_char'
eval_interval = None  # only at the end
eval_iters = None  # the whole validation split, 111,540 characters
eval_train = False
log_interval = 10
always_save_checkpoint = False
sample_tokens = 100

# 32 sequences * 64 characters = 2,048 tokens per step; * 100 steps = a fifth of the text, at first
# as 64 sequences of 32: less attention, and 0.01 lower
gradient_accumulation_steps = 1
batch_size = 32
block_size = 64
short_block_size = 32
short_iters = 63
max_iters = 100
lr_decay_iters = None  # until the last step

# 12 * n_layer * n_embd^2 = 0.9M parameters in the blocks: few and wide, for a step is all overhead.
# 4 layers of 128 took a third longer to the same loss
arch = 'modern'
n_layer = 2
n_head = 3
n_embd = 192

# a hundred steps want twice the rates of a thousand, and no warm-up: blocks begin as the identity
optimizer = 'muon'
muon_lr = 0.06
muon_momentum = 0.85  # 0.9 ended 0.01 higher, 0.8 as well
learning_rate = 1.2e-2
beta1 = 0.8
beta2 = 0.95
lr_schedule = 'linear'
warmup_iters = 0
cooldown = 0.5
min_lr = 0.0
