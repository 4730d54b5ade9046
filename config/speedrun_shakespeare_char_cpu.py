# Character-level Shakespeare to a loss of 1.4697, the best in nanoGPT's README (10.7M parameters,
# three minutes on an A100). Three runs of the command took 79 to 84 s on 2 cores of an AMD EPYC
# with AVX512-BF16, to 1.463, 1.464 and 1.466.
# $ python train.py config/speedrun_shakespeare_char_cpu.py

dataset = 'shakespeare_char'
eval_interval = None  # only at the end
eval_iters = None  # the whole validation split, 111,540 characters
eval_train = False
log_interval = 20
always_save_checkpoint = False

# 12 sequences * 256 characters = 3,072 tokens per step; * 775 steps = 2.4 epochs.
# Half the steps see the same tokens as 48 sequences of 64, with a quarter of the attention: nearby
# context is learned first. With 256 throughout, the loss was 0.014 higher after the same time
gradient_accumulation_steps = 1
batch_size = 12
block_size = 256
short_block_size = 64
short_iters = 410
max_iters = 775
lr_decay_iters = None  # the last step

# 12 * n_layer * n_embd^2 = 1.5M parameters in the blocks. Attention with two wide heads costs
# half as much as with four; 4 layers of 192 and 3 of 256 were slower to the same loss
arch = 'modern'
n_layer = 5
n_head = 2
n_embd = 160

# a short run needs high learning rates that decay for most of the run, and a low momentum: with a
# momentum of 0.95 the loss was 0.02 higher, with a cooldown of 0.6 it was 0.01 higher
optimizer = 'muon'
muon_lr = 0.03
muon_momentum = 0.9
learning_rate = 6e-3
beta1 = 0.8
beta2 = 0.95
weight_decay = 0.1  # 0.3 was worse; the run is too short for dropout to help
lr_schedule = 'linear'
warmup_iters = 5
cooldown = 0.9
min_lr = 0.0
