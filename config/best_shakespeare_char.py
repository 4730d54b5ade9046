# The lowest loss on character-level Shakespeare in 20 minutes: 1.393. The command took 18 min 59 s
# on 2 cores of an AMD EPYC with AVX512-BF16, before the last change of the optimizer.
# $ python train.py config/best_shakespeare_char.py

dataset = 'shakespeare_char'
eval_interval = 1600  # halfway, while the sequences are still short, and at the end
eval_iters = None  # the whole validation split, 111,540 characters
log_interval = 20
always_save_checkpoint = False

# 8 sequences * 512 characters = 4,096 tokens per step; * 3,200 steps = 13 epochs.
# More than half of the steps use sequences of 128 characters, which makes them a fifth faster
gradient_accumulation_steps = 1
batch_size = 8
block_size = 512
short_block_size = 128
short_iters = 1900
max_iters = 3200
lr_decay_iters = None  # the last step

# 12 * n_layer * n_embd^2 = 4.7M parameters in the blocks, five per character of training text
arch = 'modern'
n_layer = 6
n_head = 4
n_embd = 256
dropout = 0.15  # 0.2 ended at 1.417 after 3,100 steps

# with three thousand steps, Muon's usual learning rate works, decayed to zero
optimizer = 'muon'
muon_lr = 0.02
muon_momentum = 0.95
learning_rate = 4e-3
beta1 = 0.8
beta2 = 0.95
weight_decay = 0.1
lr_schedule = 'linear'
warmup_iters = 10
cooldown = 1.0
min_lr = 0.0
