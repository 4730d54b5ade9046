# nanoGPT's recipe for a laptop, with twice its learning rate: a 0.8M-parameter character model of
# Shakespeare. The command took 41 s on 2 cores of an AMD EPYC with AVX512-BF16.
# $ python train.py train_shakespeare_char_cpu

dataset = 'shakespeare_char'
eval_interval = 250  # evaluations are cheap
eval_iters = 20  # 20 batches * 12 sequences * 64 characters = 15,360 of 111,540
log_interval = 50
always_save_checkpoint = False  # keep only the last two and the best

# 12 sequences * 64 characters = 768 tokens per step; * 2,000 steps = 1.5 epochs
gradient_accumulation_steps = 1
batch_size = 12
block_size = 64
max_iters = 2000
lr_decay_iters = None  # the last step

# a baby GPT: 12 * n_layer * n_embd^2 = 0.79M parameters in the blocks
n_layer = 4
n_head = 4
n_embd = 128
dropout = 0.0  # 1.5 epochs are too few to overfit

learning_rate = 2e-3  # validation loss 1.81; with nanoGPT's 1e-3, 1.91
min_lr = 0.0
warmup_iters = 100
beta2 = 0.99  # few tokens per step: average the squared gradients over more of them
