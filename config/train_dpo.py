# Teach a model that answers which of two answers is better, with pairs of them:
# $ python data/chat/prepare.py pairs.jsonl --name=pairs --tokenizer=out/chat --block_size=256
# $ python train.py train_dpo --dataset=pairs --init_from=out/chat --out_dir=out/preferred

objective = 'dpo'
dataset = 'pairs'  # the --name of data/chat/prepare.py
init_from = 'out/chat'
dpo_beta = 0.1

# 4 pairs * 8 = 32 per step
gradient_accumulation_steps = 8
batch_size = 4
epochs = 1
block_size = 1024  # the model keeps its own, if that is shorter

# the paper's rate (Rafailov et al. 2023, appendix B): more soon ruins what was learned before
learning_rate = 1e-6
min_lr = 0.0
lr_schedule = 'constant'
warmup_iters = 10
weight_decay = 0.0

eval_interval = 50
eval_iters = None  # the whole validation split
eval_train = False
always_save_checkpoint = False
