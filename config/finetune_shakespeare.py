# GPT-2 124M, fine-tuned to write Shakespeare: nanoGPT's recipe, with the smallest GPT-2 instead of
# the largest. The weights are downloaded from the Hugging Face Hub; --init_from=FOLDER reads them
# from a folder.
# $ python train.py finetune_shakespeare
# $ python train.py finetune_shakespeare --lora_rank=8 --learning_rate=3e-4   # a LoRA adapter

init_from = 'gpt2'  # nanoGPT uses gpt2-xl
dataset = 'shakespeare'
eval_interval = 5
eval_iters = 40
log_interval = 1
always_save_checkpoint = False  # it soon overfits: only the best checkpoint matters

# 1 sequence * 1,024 tokens * 32 micro-batches = 32,768 per step; the text has 301,966 tokens, so
# 20 steps are two epochs
batch_size = 1
gradient_accumulation_steps = 32
max_iters = 20

learning_rate = 3e-5  # a twentieth of GPT-2's pretraining rate, constant
decay_lr = False
