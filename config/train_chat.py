# Supervised fine-tuning (SFT) on conversations. Prepare them with the tokenizer of the base model,
# then train:
# $ python data/chat/prepare.py talks.jsonl --name=talks --tokenizer=out/base
# $ python train.py train_chat --dataset=talks --init_from=out/base --out_dir=out/chat

objective = 'sft'
dataset = 'talks'  # the --name of data/chat/prepare.py
init_from = 'gpt2'

# 8 sequences * 2 micro-batches = 16 sequences per step; each packs several conversations
gradient_accumulation_steps = 2
batch_size = 8
epochs = 3  # more would memorize the data
mask_documents = True  # no attention between the conversations of a sequence
block_size = 1024  # if the base's context is shorter, that is used

# a twelfth of GPT-2's pretraining rate; models of a few million parameters can use 3e-4
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
