# Teach a base model to answer. Prepare the conversations with its tokenizer, then tune it on them:
# $ python data/chat/prepare.py talks.jsonl --name=talks --tokenizer=out/base --block_size=256
# $ python train.py train_chat --dataset=talks --init_from=out/base --out_dir=out/chat

objective = 'sft'
dataset = 'talks'  # the --name of data/chat/prepare.py
init_from = 'gpt2'

# 8 rows * 2 = 16 per step; a row holds several conversations
gradient_accumulation_steps = 2
batch_size = 8
epochs = 3  # more are learned by heart
block_size = 1024  # the base keeps its own, if that is shorter

# a twelfth of what GPT-2 is pretrained with; a model of a few million parameters bears 3e-4
learning_rate = 5e-5
min_lr = 0.0
lr_schedule = 'linear'
cooldown = 1.0
warmup_iters = 10
weight_decay = 0.0

eval_interval = 50
eval_iters = None  # the whole validation split
eval_train = False
eval_sample_tokens = 64
always_save_checkpoint = False
