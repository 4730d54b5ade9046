# A template for your own text. Prepare it, then train on it:
# $ python data/text/prepare.py novel.txt more/ --name=mine --tokenizer=byte
# $ python train.py train_text --dataset=mine
# The size is meant for one to twenty million bytes of text on a CPU. With more text or a GPU, raise
# n_embd, n_layer and max_iters together. With --tokenizer=gpt2, a token is about four bytes.

dataset = 'mine'  # the --name of data/text/prepare.py

# 16 sequences * 256 tokens = 4,096 per step; * 2,000 steps = 8 million tokens
gradient_accumulation_steps = 1
batch_size = 16  # out of memory? halve it, and double gradient_accumulation_steps
block_size = 256  # context: how many tokens back the model looks
max_iters = 2000
lr_decay_iters = None  # the last step

# 12 * n_layer * n_embd^2 = 1.8M parameters in the blocks
n_layer = 4
n_head = 6
n_embd = 192
dropout = 0.1  # 0.0 for less than one epoch, 0.2 for ten

learning_rate = 2e-3
min_lr = 0.0
lr_schedule = 'linear'
warmup_iters = 100
beta2 = 0.99

eval_interval = 250
eval_iters = 20
log_interval = 10
always_save_checkpoint = False  # keep only the last two and the best
patience = 4  # evaluations without a new best: 4 * 250 steps
