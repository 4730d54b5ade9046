# Character-level Shakespeare to a loss of 1.4697, the best in nanoGPT's README (10.7M parameters,
# three minutes on an A100), on one GPU. Not run there yet: launch/gpu_day.sh times it. Whether it
# reaches the loss is not known either: of a run with max_iters=350, the first 80 steps ran on a
# CPU, to a training loss of 1.62. The sizes are chosen for an H100, where such a run waits for the
# launch of kernels more than for their work: few layers and steps, each with more work than in
# speedrun_shakespeare_char_cpu.
# $ python train.py config/speedrun_shakespeare_char_gpu.py

dataset = 'shakespeare_char'
eval_interval = None  # only at the end
eval_iters = None  # the whole validation split, 111,540 characters
eval_train = False
log_interval = 10
always_save_checkpoint = False

# 32 sequences * 256 characters = 8,192 tokens per step; * 400 steps = 3.3 epochs. All sequences
# have one length: a second one would be compiled, too
gradient_accumulation_steps = 1
batch_size = 32
block_size = 256
max_iters = 400
lr_decay_iters = None  # the last step

# 12 * n_layer * n_embd^2 = 7.1M parameters in the blocks; heads of 128, as in NanoChat
arch = 'modern'
n_layer = 4
n_head = 3
n_embd = 384
compile = True  # takes longer than the training, and is counted apart

# as in speedrun_shakespeare_char_cpu
optimizer = 'muon'
muon_lr = 0.03
muon_momentum = 0.9
learning_rate = 6e-3
beta1 = 0.8
beta2 = 0.95
weight_decay = 0.1
lr_schedule = 'linear'
warmup_iters = 5
cooldown = 0.9
min_lr = 0.0
