# Character-level Shakespeare to a loss of 1.4697, the best in nanoGPT's README (10.7M parameters,
# three minutes on an A100). Three runs of the command took 54 to 56 s on 2 cores of an AMD EPYC
# with AVX512-BF16, to 1.463, 1.464 and 1.471.
# $ python train.py config/speedrun_shakespeare_char_cpu.py

dataset = 'shakespeare_char'
eval_interval = None  # only at the end
eval_iters = None  # the whole validation split, 111,540 characters
eval_train = False
log_interval = 20
always_save_checkpoint = False

# 12 sequences * 256 characters = 3,072 tokens per step; * 950 steps = 2.9 epochs.
# Half the steps see the same tokens as 48 sequences of 64, with a quarter of the attention: nearby
# context is learned first. With 256 throughout, the loss was 0.014 higher after the same time
gradient_accumulation_steps = 1
batch_size = 12
block_size = 256
short_block_size = 64
short_iters = 500
max_iters = 950
lr_decay_iters = None  # the last step

# 12 * n_layer * n_embd^2 = 0.8M parameters in the blocks: in less than a minute, more steps are
# worth more than a larger model. 3 layers of 192 or 256, 4 of 160 or 192 and 5 of 128 ended between
# 1.486 and 1.526 after as long
arch = 'modern'
n_layer = 4
n_head = 2
n_embd = 128

# a short run needs high learning rates that decay for most of the run, and a low momentum: with a
# momentum of 0.95 the loss was 0.02 higher, with a cooldown of 0.6 it was 0.01 higher
optimizer = 'muon'
muon_lr = 0.04
muon_momentum = 0.9
learning_rate = 7e-3
beta1 = 0.8
beta2 = 0.95
weight_decay = 0.1  # 0.3 was worse; the run is too short for dropout to help
lr_schedule = 'linear'
warmup_iters = 5
cooldown = 0.9
min_lr = 0.0
