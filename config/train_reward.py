# A reward model, which learns from preference pairs to give a completion a number:
# $ python data/chat/prepare.py pairs.jsonl --name=pairs --tokenizer=out/chat
# $ python train.py train_reward --dataset=pairs --init_from=out/chat --out_dir=out/reward_model
# $ python data/prompts/prepare.py letters.jsonl --name=letters --tokenizer=out/chat
# $ python train.py train_rl --dataset=letters --init_from=out/chat --reward=out/reward_model

objective = 'reward'
dataset = 'pairs'  # the --name of data/chat/prepare.py
init_from = 'out/chat'

# 4 pairs * 8 micro-batches = 32 pairs per step
gradient_accumulation_steps = 8
batch_size = 4
epochs = 1  # more, and it learns the pairs by heart
block_size = 1024  # if the model's context is shorter, that is used

# as for InstructGPT (Ouyang et al. 2022, appendix C.2)
learning_rate = 9e-6
min_lr = 9e-7
warmup_iters = 10
weight_decay = 0.0

eval_interval = 50
eval_iters = None  # the whole validation split
eval_train = False
always_save_checkpoint = False
