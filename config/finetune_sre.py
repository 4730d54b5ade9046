# GPT-2 on Google's books about site reliability engineering; the first start fetches their pages.
# $ python train.py config/finetune_sre.py
# $ python sample.py --chat
# The console goes on with what you type, as the books would: ask, or begin the answer yourself.
# Two books are soon learned by heart: the model with the lowest validation loss is kept.

dataset = 'sre'
init_from = 'gpt2'  # or gpt2-medium, gpt2-large, gpt2-xl, or the folder of a run

# 4 sequences * 8 micro-batches * 256 tokens = 8,192 per step
batch_size = 4
gradient_accumulation_steps = 8
block_size = 256  # 1024 is GPT-2's most
epochs = 3

dropout = 0.1
learning_rate = 3e-5  # constant, a twentieth of train_gpt2's: what it knows should stay
decay_lr = False

eval_interval = 10
eval_iters = None  # the whole validation split, every tenth chapter
eval_train = False
eval_sample_tokens = 100
log_interval = 1
always_save_checkpoint = False  # the best and the last two
patience = 5  # stop after 5 evaluations * 10 steps without a new best
