# GPT-2 124M on OpenWebText, to a validation loss of about 2.85 (nanoGPT's published run took four
# to five days on one node with 8 A100 40 GB). Prepare the text first: data/openwebtext/prepare.py
# $ torchrun --standalone --nproc_per_node=8 train.py train_gpt2

dataset = 'openwebtext'
wandb_log = False  # --wandb_log shows the run in a browser
wandb_project = 'owt'
wandb_run_name = 'gpt2-124M'

# 12 sequences * 1,024 tokens * 40 micro-batches = 491,520 tokens per step, GPT-2's half a million
batch_size = 12
block_size = 1024
gradient_accumulation_steps = 5 * 8  # 5 on each of 8 GPUs

# 600,000 steps * 491,520 tokens = 295 billion tokens: 33 epochs of 9 billion
max_iters = 600000
lr_decay_iters = None  # the last step
warmup_iters = 2000

eval_interval = 1000  # also saves: at nanoGPT's speed, a power cut loses at most 12 minutes
eval_iters = 200  # 200 * 12 sequences = 2.5 million tokens: the error of the loss is about 0.01
log_interval = 10
always_save_checkpoint = False  # 600 checkpoints of 1.5 GB would be too many

learning_rate = 6e-4  # GPT-3's for this size (Brown et al. 2020, table 2.1)
min_lr = 6e-5  # a tenth of it
weight_decay = 1e-1
