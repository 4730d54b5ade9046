# GPT-2 on Google's books about site reliability engineering. The first start downloads the pages.
# $ python train.py config/finetune_sre.py
# $ python sample.py --chat
# The chat console continues your text in the style of the books: type a question, or the beginning
# of an answer.
# Two books are memorized quickly, so the checkpoint with the lowest validation loss is kept.

dataset = 'sre'
init_from = 'gpt2'  # or gpt2-medium, gpt2-large, gpt2-xl, or a run directory

# 4 sequences * 8 micro-batches * 256 tokens = 8,192 per step
batch_size = 4
gradient_accumulation_steps = 8
block_size = 256  # GPT-2's maximum is 1024
epochs = 3

dropout = 0.1
learning_rate = 3e-5  # constant, a twentieth of train_gpt2's, to keep what GPT-2 has learned
decay_lr = False

eval_interval = 10
eval_iters = None  # the whole validation split: every tenth chapter
eval_train = False
eval_sample_tokens = 100
log_interval = 1
always_save_checkpoint = False  # keep only the last two and the best
patience = 5  # evaluations without a new best: 5 * 10 steps
