# The best model that this machine can train in the given time:
# $ python data/text/prepare.py novel.txt more/ --name=mine --tokenizer=byte
# $ python train.py config/auto.py --dataset=mine --minutes=10
# It chooses the shape, the context, the batch, the schedule and the number of steps, and writes
# them into the run's config.py. Settings that you give, such as --n_layer=4, are kept.

dataset = 'pydocs'  # the documentation that comes with Python; prepared by the first run
minutes = 4.0  # from the start of the command to its end

arch = 'modern'
optimizer = 'muon'
beta1 = 0.8
beta2 = 0.95
weight_decay = 0.1
lr_schedule = 'linear'
cooldown = 0.9
min_lr = 0.0

eval_train = False
always_save_checkpoint = False  # keep only the last two and the best
sample_tokens = 600
