# Character-level Shakespeare to nanoGPT's 1.4697 (its README's best on an A100, with 10.7M
# parameters and a GPU's three minutes), on two CPU cores in a minute and a half
# $ python train.py config/speedrun_shakespeare_char_cpu.py

dataset = 'shakespeare_char'
eval_interval = None  # only at the end
eval_iters = None  # the whole validation split, 111,540 characters
eval_train = False
log_interval = 20
always_save_checkpoint = False

# 12 sequences * 256 characters = 3,072 tokens per step; * 775 steps = 2.4 passes over the text.
# Half the steps see the same tokens as 48 sequences of 64, with a quarter of the attention: the
# first thing to learn is what lies near, and all of them on 256 ended 0.014 higher in the same time
gradient_accumulation_steps = 1
batch_size = 12
block_size = 256
short_block_size = 64
short_iters = 410
max_iters = 775
lr_decay_iters = None  # until the last step

# 12 * n_layer * n_embd^2 = 1.5M parameters in the blocks. Two wide heads cost half the attention of
# four; 4 layers of 192 and 3 of 256 were slower to the same loss
arch = 'modern'
n_layer = 5
n_head = 2
n_embd = 160

# few steps want high rates that fall for nearly all of the run, and a short memory: a momentum of
# 0.95 ended 0.02 higher, a cool-down over 0.6 of the run 0.01
optimizer = 'muon'
muon_lr = 0.03
muon_momentum = 0.9
learning_rate = 6e-3
beta1 = 0.8
beta2 = 0.95
weight_decay = 0.1  # 0.3 ended higher; dropout has no time to pay
lr_schedule = 'linear'
warmup_iters = 5
cooldown = 0.9
min_lr = 0.0
