# Shakespeare with GPT-2's tokenizer, from scratch: the baseline for fine-tuning
# $ python train.py train_shakespeare

dataset = 'shakespeare'
eval_interval = 100
eval_iters = None  # the whole validation split, 36,059 tokens
log_interval = 10
always_save_checkpoint = False  # it overfits early: only the best checkpoint matters
patience = 5  # evaluations without a new best: 5 * 100 steps

# 16 sequences * 256 tokens = 4,096 per step; the text has 301,966 tokens, so an epoch is 74 steps
gradient_accumulation_steps = 1
batch_size = 16
block_size = 256
max_iters = 1000
lr_decay_iters = None  # the last step

# 50,304 * n_embd = 9.7M parameters of embedding, 12 * n_layer * n_embd^2 = 1.8M in the blocks
n_layer = 4
n_head = 6
n_embd = 192
dropout = 0.2  # 13 epochs of a small text

learning_rate = 1e-3
min_lr = 1e-4
warmup_iters = 50
