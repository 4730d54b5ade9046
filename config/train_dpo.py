# Direct preference optimization (DPO) of a chat model, on pairs of a chosen and a rejected
# completion:
# $ python data/chat/prepare.py pairs.jsonl --name=pairs --tokenizer=out/chat
# $ python train.py train_dpo --dataset=pairs --init_from=out/chat --out_dir=out/preferred

objective = 'dpo'
dataset = 'pairs'  # the --name of data/chat/prepare.py
init_from = 'out/chat'
dpo_beta = 0.1

# 4 pairs * 8 micro-batches = 32 pairs per step
gradient_accumulation_steps = 8
batch_size = 4
epochs = 1
block_size = 1024  # if the model's context is shorter, that is used

# from the paper (Rafailov et al. 2023, appendix B); a much higher rate degrades the model
learning_rate = 1e-6
min_lr = 0.0
lr_schedule = 'constant'
warmup_iters = 10
weight_decay = 0.0

eval_interval = 50
eval_iters = None  # the whole validation split
eval_train = False
always_save_checkpoint = False
