# GPT-2 learns to continue film reviews in a positive tone; a classifier of the Hub is the reward.
# Not run: its weights were out of reach. Tested with small stand-ins.
# $ pip install transformers pyarrow
# $ python train.py rl_sentiment

objective = 'rl'
dataset = 'imdb_prompts'  # prepared by the first run
init_from = 'lvwerra/gpt2-imdb'  # GPT-2, fine-tuned on the reviews
reward = 'data/imdb_prompts/reward.py'  # the classifier's logit of "positive"

# 32 prompts * 8 completions of at most 16 tokens
batch_size = 8
gradient_accumulation_steps = 4
rl_samples = 8
rl_tokens = 16
rl_kl = 0.05
block_size = 128
max_iters = 200
lr_decay_iters = None  # the last step

learning_rate = 1.4e-5
min_lr = 0.0
lr_schedule = 'constant'
warmup_iters = 5
weight_decay = 0.0

eval_interval = 50
eval_iters = 32  # * 8 prompts
log_interval = 5
always_save_checkpoint = False
