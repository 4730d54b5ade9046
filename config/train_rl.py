# Reinforcement learning: a reward, in plain Python, scores what the model writes after a prompt.
# $ python data/prompts/prepare.py sums.jsonl --name=sums --tokenizer=out/chat
# $ python train.py train_rl --dataset=sums --init_from=out/chat --reward=rewards.py

objective = 'rl'
dataset = 'sums'  # the --name of data/prompts/prepare.py
init_from = 'out/chat'
reward = 'exact'  # 1 if the completion is the record's "answer"; or your own, FILE.py:function

# 4 prompts * 4 micro-batches * 8 completions = 128 completions per step
batch_size = 4
gradient_accumulation_steps = 4
rl_samples = 8
rl_tokens = 64
block_size = 1024  # if the model's context is shorter, that is used
max_iters = 200
lr_decay_iters = None  # the last step

# far below a pretraining rate: policy gradients are noisy, and without rl_kl nothing keeps the
# model near its start
learning_rate = 1e-5
min_lr = 0.0
lr_schedule = 'constant'
warmup_iters = 5
weight_decay = 0.0

eval_interval = 50
eval_iters = 16  # * 4 prompts
always_save_checkpoint = False
