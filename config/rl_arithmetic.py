# Reinforcement learning with a reward of 0 or 1: sums, of which the model of sft_arithmetic gets
# about half wrong.
# $ python train.py sft_arithmetic --out_dir=out/arithmetic
# $ python train.py rl_arithmetic --init_from=out/arithmetic

objective = 'rl'
dataset = 'arithmetic_prompts'  # made up by the first run
init_from = 'out/arithmetic'
reward = 'exact'

# 64 prompts * 8 completions of at most 6 tokens: five digits and the end
batch_size = 64
gradient_accumulation_steps = 1
rl_samples = 8
rl_tokens = 6
block_size = 128
max_iters = 800
lr_decay_iters = None  # the last step

optimizer = 'muon'
muon_lr = 0.002  # with 0.005 the rewards fell at first
learning_rate = 4e-4
min_lr = 0.0
lr_schedule = 'linear'
cooldown = 0.5
warmup_iters = 5
weight_decay = 0.0

eval_interval = 200
eval_iters = None  # all 512 sums that were held out
log_interval = 10
always_save_checkpoint = False
