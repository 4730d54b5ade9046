# The quickstart's model, trained on manuals, learns Shakespeare: with all parameters, with a LoRA
# adapter of a thirtieth of them or, for comparison, from scratch. The first command took 22 s on 2
# cores of an Intel Xeon with AMX.
# $ python data/shakespeare_char/prepare.py    # downloads input.txt
# $ python data/text/prepare.py data/shakespeare_char/input.txt --name=bard --tokenizer=byte
# $ python train.py quickstart --out_dir=out/mine
# $ python train.py finetune_laptop --init_from=out/mine
# $ python train.py finetune_laptop --init_from=out/mine --lora_rank=4 --learning_rate=2e-2
# $ python train.py finetune_laptop --init_from=scratch --learning_rate=1e-2

init_from = 'out/mine'
dataset = 'bard'

# 12 sequences * 256 bytes = 3,072 per step; * 150 steps = 460,800: half an epoch
gradient_accumulation_steps = 1
batch_size = 12
block_size = 256
max_iters = 150

# the quickstart's shape, for init_from='scratch'
arch = 'modern'
n_layer = 5
n_head = 2
n_embd = 160

learning_rate = 3e-3  # the better of 1e-3 and 3e-3
warmup_iters = 5
lr_decay_iters = None  # the last step
min_lr = 0.0
beta2 = 0.95

eval_interval = 50
eval_iters = None  # the whole validation split
eval_train = False
log_interval = 10
always_save_checkpoint = False  # keep only the last two and the best
sample_tokens = 400
