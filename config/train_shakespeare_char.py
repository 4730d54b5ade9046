# A 10.7M-parameter character model of Shakespeare: nanoGPT's recipe for a GPU, where nanoGPT
# reaches about 1.47 on one A100 in minutes. On a CPU, use train_shakespeare_char_cpu.
# $ python train.py train_shakespeare_char

dataset = 'shakespeare_char'
eval_interval = 250  # often, because it overfits well before the end
eval_iters = None  # the whole validation split, 111,540 characters
log_interval = 10
always_save_checkpoint = False  # keep only the last two and the best

# 64 sequences * 256 characters = 16,384 tokens per step; * 5,000 steps = 82 epochs
gradient_accumulation_steps = 1
batch_size = 64
block_size = 256
max_iters = 5000
lr_decay_iters = None  # the last step

# 12 * n_layer * n_embd^2 = 10.6M parameters in the blocks
n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2  # needed: ten parameters per character of training text

learning_rate = 1e-3  # small models can use a higher rate than GPT-2's 6e-4
min_lr = 1e-4  # a tenth of it
warmup_iters = 100
beta2 = 0.99  # few tokens per step: average the squared gradients over more of them
