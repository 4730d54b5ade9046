# GPT-2 124M, fine-tuned to write Shakespeare: nanoGPT's recipe, with the smallest GPT-2 in place of
# the largest. Its weights come from the hub, or from a folder: --init_from=FOLDER
# $ python train.py finetune_shakespeare
# $ python train.py finetune_shakespeare --lora_rank=8 --learning_rate=3e-4   # adapters alone

init_from = 'gpt2'  # nanoGPT takes gpt2-xl
dataset = 'shakespeare'
eval_interval = 5
eval_iters = 40
log_interval = 1
always_save_checkpoint = False  # it soon knows the text by heart: the best counts

# 1 sequence * 1,024 tokens * 32 micro-batches = 32,768 per step; the text has 301,966, so 20 steps
# are two passes over it
batch_size = 1
gradient_accumulation_steps = 32
max_iters = 20

learning_rate = 3e-5  # a twentieth of what GPT-2 is trained with, and constant
decay_lr = False
