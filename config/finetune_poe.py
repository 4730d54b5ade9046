# GPT-2 on the works of Edgar Allan Poe. The first start downloads the books.
# $ python train.py config/finetune_poe.py

dataset = 'poe'
init_from = 'gpt2'

# 4 sequences * 8 micro-batches * 256 tokens = 8,192 per step
batch_size = 4
gradient_accumulation_steps = 8
block_size = 256
epochs = 3

dropout = 0.1
learning_rate = 3e-5
decay_lr = False

eval_interval = 10
eval_iters = None  # the whole validation split: the end of each book
eval_train = False
eval_sample_tokens = 100
log_interval = 1
always_save_checkpoint = False  # keep only the last two and the best
patience = 5  # evaluations without a new best: 5 * 10 steps
